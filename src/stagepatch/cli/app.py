"""The command line: `stagepatch COMMAND --config FILE.yaml --key value`. Nothing heavy is imported for help."""

import errno
import sys
import threading
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

COMMANDS = {
    "demo": "patch a bundled model and report what it gained",
    "train": "train a patch on a converged model's own data",
    "cache": "encode images and captions once, for training on latents",
    "sample": "generate images with a model, patched or not",
    "evaluate": "measure a model, a patch against its base, or any two sets of images",
    "compare": "train and measure many methods alike, in one table",
    "decouple": "train one copy of a model for each range of timesteps",
    "assemble": "train LoRA experts for ranges of timesteps, and a router that mixes them",
    "experts": "limit LoRAs to ranges of timesteps, in one file for `sample`",
    "merge": "merge models of one architecture, or LoRAs, into one",
    "analyze": "show where over the timesteps a model has room, and a patch used it",
    "diagnose": "say what limits a model, and what is worth trying, before you train",
    "schedule": "search which model of a zoo to use for each step, under a time budget",
    "params": "count a patch's parameters for a named model",
    "inspect": "say what a patch, model, run or checkpoint holds",
    "export": "write LoRAs in the key names of diffusers, kohya's scripts or ComfyUI",
    "push": "put what was learned on the Hub, with a card",
    "pretrain": "train a DiT, or a U-Net, from scratch",
}
# Options that may be given by their places, before the others.
_PLACES = {
    "inspect": ["path"],
    "export": ["path", "output"],
    "push": ["path", "repo_id"],
    "evaluate": ["model", "against"],
    "diagnose": ["model", "data.source"],
}
# No space, quota, permission, a read-only or a broken disk: not what a command can do anything about.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_ALIASES = {"-h": "--help", "-V": "--version"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a user's mistake, 128 + signal when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = _ALIASES.get(arguments[0], arguments[0]) if arguments else "--help"
    if command == "--help":
        print(_usage())
        return 0
    if command == "--version":
        import stagepatch

        print(f"stagepatch {stagepatch.__version__}")
        return 0
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        print(f"stagepatch: no command '{command}'.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    return _run(command, arguments[1:])


def _usage() -> str:
    lines = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    return (
        "usage: stagepatch COMMAND [--config FILE.yaml] [--key value ...]\n\n"
        "Stage-specific skill for a converged diffusion model, from its own training data.\n\n"
        f"commands:\n{lines}\n\n"
        "stagepatch COMMAND --help explains every key of a command."
    )


def _run(command: str, arguments: list[str]) -> int:
    from stagepatch.core.errors import Interrupted, UserError

    for number, name in enumerate(_PLACES.get(command, [])):
        if arguments[2 * number :] and not arguments[2 * number].startswith("-"):
            arguments = [*arguments[: 2 * number], f"--{name}", *arguments[2 * number :]]
    threading.excepthook = _say_of_thread
    try:
        config, resolved = _parse(command, arguments)
        from importlib import import_module

        getattr(import_module(f"stagepatch.cli.{command}"), command)(config, resolved)
    except UserError as error:
        print(f"stagepatch {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstagepatch {command}: stopped.", file=sys.stderr)
        return 130
    except Interrupted as error:
        print(f"\nstagepatch {command}: {error}", file=sys.stderr)
        return 128 + error.signum
    except (OSError, RuntimeError) as error:
        if not (said := _in_words(error)):
            raise
        kept = "What is written is whole: the same command goes on from it."
        print(f"stagepatch {command}: {said} {kept}", file=sys.stderr)
        return 2
    return 0


def _in_words(error: OSError | RuntimeError) -> str:
    """What is not a mistake of the program's, nor of the user's; empty for all else."""
    if isinstance(error, OSError):
        return f"'{error.filename or 'A file'}': {error.strerror}." if error.errno in _OF_THE_DISK else ""
    from accelerate.utils.memory import should_reduce_batch_size

    from stagepatch.core import LEFT_ALONE, is_left_alone

    if should_reduce_batch_size(error):
        return "Out of memory: give smaller batches, or hold the model in less memory (docs/memory.md)."
    return LEFT_ALONE if is_left_alone(error) else ""


def _say_of_thread(raised: threading.ExceptHookArgs) -> None:
    """A full disk is found by a tracker's thread first; what it writes for says the rest."""
    if isinstance(raised.exc_value, OSError):
        print(f"stagepatch: {raised.exc_value}", file=sys.stderr)
    else:
        threading.__excepthook__(raised)


def _parse(command: str, arguments: list[str]) -> tuple[object, str]:
    """The command's config object, and the same as YAML."""
    from argparse import ArgumentError
    from dataclasses import fields, is_dataclass
    from operator import attrgetter

    from jsonargparse import Namespace

    from stagepatch.cli import config as configs
    from stagepatch.core.errors import UserError

    config_class = getattr(configs, f"{command.capitalize()}Config")
    parser = _make_parser(command, config_class)
    keys = _keys(config_class)
    if command == "train":
        keys["preset"] = str
    _check_for_tokens([*arguments, *_config_files(arguments)])
    arguments = _with_flags(arguments, keys)
    try:
        if command == "train":
            from stagepatch.training.presets import preset_values

            given = [argument for argument in arguments if not argument.startswith("--print_config")]
            parser.set_defaults(preset_values(parser.parse_args(given).preset))
        namespace = parser.parse_args(arguments)
    except UserError:
        raise
    except (ArgumentError, ValueError) as error:  # ValueError: a text with a NUL, which is looked for as a file
        raise UserError(f"{error}\nstagepatch {command} --help explains every key.") from error
    for name, kind in keys.items():
        if is_dataclass(kind) and not isinstance(value := namespace.get(name), Namespace):
            raise UserError(f"{name} is {value!r}, and takes keys of its own, such as {name}.{fields(kind)[0].name}.")
    names = _keys(config_class)
    built = vars(parser.instantiate_classes(namespace))
    try:
        config = config_class(**{name: value for name, value in built.items() if name in names})
    except TypeError as error:
        raise UserError(str(error)) from error
    for name in _left_open(config_class):
        namespace[name] = attrgetter(name)(config)
    return config, parser.dump(namespace)


def _make_parser(command: str, config_class: type) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"stagepatch {command}",
        usage=f"stagepatch {command} [--config FILE.yaml] [--key value ...]",
        description=str(config_class.__doc__).split("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(config_class)
    # A part's own default has settled these by its other defaults, whatever is given for those.
    parser.set_defaults(dict.fromkeys(_left_open(config_class)))
    if command == "train":
        from stagepatch.training.presets import PRESET_HELP, PRESETS

        parser.add_argument("--preset", choices=list(PRESETS), default="paper", help=PRESET_HELP)
    return parser


def _keys(config_class: type, prefix: str = "") -> dict[str, object]:
    """The type of every key of a config, by its dotted name."""
    from dataclasses import is_dataclass
    from typing import get_type_hints

    keys: dict[str, object] = {}
    for name, kind in get_type_hints(config_class).items():
        keys[prefix + name] = kind
        if isinstance(kind, type) and is_dataclass(kind):
            keys |= _keys(kind, f"{prefix}{name}.")
    return keys


def _left_open(config_class: type, prefix: str = "") -> list[str]:
    """Dotted keys of a config's parts that have no default of their own: it follows from the part's other keys."""
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    keys = []
    kinds = get_type_hints(config_class)
    for part in fields(config_class):
        kind = kinds[part.name]
        if isinstance(kind, type) and is_dataclass(kind):
            keys += _left_open(kind, f"{prefix}{part.name}.")
        elif prefix and part.default is None:
            keys.append(prefix + part.name)
    return keys


def _with_flags(arguments: list[str], keys: dict[str, object]) -> list[str]:
    """Arguments in which a boolean without a value is true; a key that there is not is refused with its neighbour."""
    import difflib
    from dataclasses import is_dataclass

    from stagepatch.core.errors import UserError

    completed = []
    mappings = [f"{key}." for key, kind in keys.items() if not is_dataclass(kind)]  # whose keys are anyone's
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        name, is_given, _ = argument.removeprefix("--").partition("=")
        is_key = argument.startswith("--") and name not in ("config", "help", "print_config", "")
        if is_key and name.rstrip("+") not in keys and not name.startswith(tuple(mappings)):
            close = difflib.get_close_matches(name, keys, n=1)
            hint = f" Did you mean --{close[0]}?" if close else ""
            raise UserError(f"There is no option --{name}.{hint}")
        is_flag = is_key and keys.get(name) in (bool, bool | None) and not is_given and following.startswith("--")
        completed.append(f"{argument}=true" if is_flag else argument)
    return completed


def _config_files(arguments: list[str]) -> list[str]:
    """The texts of the config files; names the one that is missing or not YAML: the parser's own messages do not."""
    from pathlib import Path

    from stagepatch.core.files import read_yaml

    texts = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, value = argument.partition("=")
        if name == "--config":
            read_yaml(value or following, "config file")
            texts.append(Path(value or following).read_text(encoding="utf-8"))
    return texts


def _check_for_tokens(texts: list[str]) -> None:
    """Refuse a token among the options, which are kept in run.yaml and shown in reports; it is not repeated."""
    import os
    import re

    from stagepatch.core.errors import UserError

    kept = [value for name in ("HF_TOKEN", "WANDB_API_KEY") if len(value := os.environ.get(name, "")) >= 8]
    if any(re.search(r"\bhf_[A-Za-z0-9]{16,}", text) or any(key in text for key in kept) for text in texts):
        raise UserError(
            "There is a token among the options, which are kept in files: take it out, revoke it if others saw it, "
            "and log in by `hf auth login` or HF_TOKEN; to wandb by `wandb login` or WANDB_API_KEY."
        )
