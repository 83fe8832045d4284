"""Every option of every command, given wrongly: exit code 2 and a line or two, before anything is loaded.

The options come from the config classes, so a new one is tried as it comes. What may be given is listed here: an
option that takes numbers below 0, for example, is one of `SIGNED`, or it refuses them.
"""

import dataclasses
import re
import types
from argparse import ArgumentError
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from jsonargparse import ArgumentParser

from stagepatch.cli import COMMANDS, app, config, main
from stagepatch.core import UserError
from stagepatch.diffusion import TimestepsConfig, WeightingConfig
from stagepatch.sampling import SamplingConfig
from stagepatch.search.config import SearchConfig
from stagepatch.studies.assemble_config import AssembleConfig
from stagepatch.studies.compare_config import PARTS, EntryConfig
from stagepatch.training import TrainingConfig

# What a number below 0 means something for.
SIGNED = {"sampling.guidance_scale", "sampling.guide_scale", "patch_scale", "weights", "call"}
SIGNED |= {"timesteps.logit_mean", "timesteps.mode_scale", "search.low", "search.high", "search.coarse", "search.fine"}
# What is refused where it is used, since the message needs more than the number.
LATER = {"weighting.gamma", "weighting.k", "timesteps.logit_std", "timesteps.shift", "timesteps.range", "ranges"}
LATER |= {"sampling.guidance_interval"}
# What names of a class's options begin with in these lists.
PREFIXES = {SamplingConfig: "sampling.", TimestepsConfig: "timesteps.", WeightingConfig: "weighting."}
PREFIXES |= {SearchConfig: "search."}


def options_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """The type of every option that is not a config itself, by its dotted name."""
    options = {}
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            options |= options_of(kind, f"{prefix}{name}.")
        else:
            options[prefix + name] = kind
    return options


def kinds_of(kind: Any) -> list[Any]:
    """What a type is made of: the members of a union, and what a list holds."""
    if get_origin(kind) in (Union, types.UnionType):
        return [each for member in get_args(kind) for each in kinds_of(member)]
    return kinds_of(get_args(kind)[0]) if get_origin(kind) is list else [kind]


def as_given(kind: Any, value: str) -> str:
    """A value, in brackets where the option is a list of such."""
    lists = [member for member in get_args(kind) or () if get_origin(member) is list]
    is_list = get_origin(kind) is list or bool(lists)
    inner = get_args(kind)[0] if get_origin(kind) is list else None
    return f"[{as_given(inner, value)}]" if is_list and inner else value


def wrong_values(name: str, kind: Any) -> list[str]:
    """What an option must refuse."""
    kinds = kinds_of(kind)
    short = name.split("validation.")[-1].split("ddo.")[-1]
    wrong = []
    if any(each in (int, float) for each in kinds):
        wrong += [".nan", ".inf", str(10**30)]
        if short not in SIGNED | LATER and name != "stage":
            wrong += ["-1"]
        if str not in kinds:
            wrong += ["words"]
    elif bool in kinds:
        wrong += ["maybe", "2"]
    elif any(get_origin(each) is Literal for each in kinds) and str not in kinds:
        wrong += ["no_such_choice"]
    elif get_origin(kind) is list:
        wrong += ["{a: b}"]
    elif get_origin(kind) is dict:
        wrong += ["words", "17"]
    return [as_given(kind, value) if get_origin(kind) is list and value != "{a: b}" else value for value in wrong]


def classes() -> dict[str, type]:
    return {command: getattr(config, f"{command.capitalize()}Config") for command in COMMANDS}


def configs_of(config_class: type) -> list[type]:
    """A config's class and those in it, of the entries of a list too."""
    kinds = [kind for hint in get_type_hints(config_class).values() for kind in kinds_of(hint)]
    inner = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    return [config_class, *(found for kind in inner for found in configs_of(kind))]


def refused(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message; the command did not get to run."""
    code = main([command, *arguments])
    message = capsys.readouterr().err
    assert code == 2, f"{command} {arguments} was taken"
    assert "Traceback" not in message
    assert len(message) < 1500
    return message


def taken(name: str, values: list[str], parse: Callable[[str], object]) -> list[str]:
    """Those of some wrong values that are not refused by the option's name, and why."""
    wrong = []
    for value in values:
        try:
            parse(f"--{name}={value}")
        except (UserError, ArgumentError) as error:
            if name.split(".")[-1] not in str(error) or len(str(error)) > 1500:
                wrong.append(f"{name}={value} is told as: {error}")
        except Exception as error:
            wrong.append(f"{name}={value}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{name}={value} is taken")
    return wrong


# One parser a class, of what is its own: a command's takes ten times as long.
CLASSES = {found: None for config_class in classes().values() for found in configs_of(config_class)}


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda found: found.__name__)
def test_wrong_values_of_every_option_are_refused(config_class):
    parser = ArgumentParser(exit_on_error=False)
    hints = get_type_hints(config_class)
    own = {name: hints[name] for name in config_class.__annotations__ if not dataclasses.is_dataclass(hints[name])}
    parser.add_class_arguments(config_class, skip={*hints} - {*own})
    required = [field.name for field in dataclasses.fields(config_class) if field.default is field.default_factory]

    def parse(argument):
        given = [f"--{name}=a" for name in required if f"--{name}=" not in argument]
        return config_class(**vars(parser.instantiate_classes(parser.parse_args([*given, argument]))))

    prefix = next((prefix for found, prefix in PREFIXES.items() if issubclass(config_class, found)), "")
    wrong = [told for name, kind in own.items() for told in taken(name, wrong_values(f"{prefix}{name}", kind), parse)]
    assert not wrong, "\n".join(wrong)


# Options that are given as fields of a config within another's: the config's class, and what takes them.
WITHIN = {
    part: (kind, lambda values, part=part: EntryConfig("a", "dmp", **{part: values})) for part, kind in PARTS.items()
}
WITHIN["assembling"] = TrainingConfig, lambda values: AssembleConfig(assembling=values)
OUT_OF_RANGE = re.compile(r"\[*(\.nan|\.inf|-1|10{30})\]*")  # which the config's own class refuses, as above


@pytest.mark.parametrize("part", WITHIN)
def test_wrong_types_of_every_option_of_a_row_are_refused(part):
    config_class, take = WITHIN[part]

    def parse(argument):
        name, value = argument[2:].split("=", 1)
        values = yaml.safe_load(value)
        for key in reversed(name.split(".")):
            values = {key: values}
        return take(values)

    wrong = []
    for name, kind in options_of(config_class).items():
        values = [value for value in wrong_values(name, kind) if not OUT_OF_RANGE.fullmatch(value)]
        wrong += taken(name, values, parse)
    assert not wrong, "\n".join(wrong)
    with pytest.raises(UserError, match=f"{part} has no key 'stepz'. Keys: "):
        take({"stepz": 1})


@pytest.mark.parametrize("part", WITHIN)
def test_defaults_of_every_option_of_a_row_are_taken(part):
    config_class, take = WITHIN[part]
    defaults = {name: value for name, value in dataclasses.asdict(config_class()).items() if value is not None}
    for values in (defaults, vars(config_class())):
        take(values)


def test_a_row_is_refused_by_its_name(capsys):
    rows = {
        "training: {steps: words}": "Entry 'a': training.steps is 'words': expected int",
        "num_stages: -1": "num_stages=-1",
    }
    for given, message in rows.items():
        assert message in refused("compare", [f"--entries=[{{name: a, method: dmp, {given}}}]"], capsys)


def test_wrong_values_of_every_option_of_every_command(monkeypatch):
    wrong = []
    for command, config_class in classes().items():
        parser = app._make_parser(command, config_class)
        monkeypatch.setattr(app, "_make_parser", lambda *_, parser=parser: parser)
        for name, kind in options_of(config_class).items():
            values = wrong_values(name, kind)
            wrong += [
                f"{command} {told}" for told in taken(name, values, lambda given, to=command: app._parse(to, [given]))
            ]
        monkeypatch.undo()
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", COMMANDS)
def test_misspelt_options_are_refused_with_their_neighbour(command, capsys):
    names = [name for name in options_of(classes()[command]) if len(name) > 3]
    for name in (names[0], names[-1]):
        message = refused(command, [f"--{name[:-2]}{name[-1]}{name[-2]}x=1"], capsys)
        assert "There is no option" in message
        assert f"Did you mean --{name}?" in message


def test_misspelt_keys_of_a_config_file_are_refused(tmp_path, capsys):
    for text in ("trainin: {steps: 5}\n", "training: {stps: 5}\n", "- a\n- b\n", "training: 5\n", "just words\n"):
        (tmp_path / "a.yaml").write_text(text)
        refused("train", ["--config", str(tmp_path / "a.yaml")], capsys)


# Those that a config alone tells.
EXCLUSIVE = [
    ("sample", ["--memory.quantization=torchao_int8", "--memory.gguf=a.gguf"]),
    ("train", ["--data.source=here", "--data.sources=[{source: there}]"]),
    ("train", ["--patch.num_experts=2", "--patch.gate=none"]),
    ("train", ["--patch.normalization=sigmoid", "--patch.selection=hard"]),
    ("train", ["--patch.gate=attention", "--patch.selection=hard"]),
    ("train", ["--patch.load_loss=smooth", "--patch.selection=soft"]),
    ("merge", ["--merge_method=fisher"]),
    ("merge", ["--merge_method=ties", "--fisher_samples=5"]),
    ("merge", ["--merge_method=fisher", "--fisher_samples=5", "--search.strategies=[grid]"]),
    ("assemble", ["--method=dmp"]),
    ("assemble", ["--objective=ddo"]),
    ("assemble", ["--lora.stage_gate=gaussian"]),
    ("decouple", ["--method=none"]),
    ("decouple", ["--prune=0.5", "--prune_budget=0.5"]),
    ("decouple", ["--prune=0.5", "--tree=[1, 1]"]),
    ("decouple", ["--tree=[3, 9]", "--boundaries=[500]"]),
    ("decouple", ["--prune_budget=0.5", "--models=[a, b]"]),
    ("decouple", ["--training.shard_base", "--consistency=1"]),
    ("decouple", ["--training.shard_base", "--consistency=0", "--spectral=0.1"]),
    ("decouple", ["--preset=experts", "--projection", "--tree=[3, 9]"]),
    ("decouple", ["--preset=experts", "--timesteps.range=[0, 0.5]"]),
    ("decouple", ["--projection", "--method=lora"]),
]


@pytest.mark.parametrize(("command", "arguments"), EXCLUSIVE, ids=lambda value: " ".join(value))
def test_options_that_exclude_each_other(command, arguments):
    with pytest.raises(UserError):
        app._parse(command, arguments)


# What leaves other keys of its part to follow from it.
FOLLOWED = [
    ("patch", {"preset": "released"}),
    ("patch", {"position": "prepend"}),
    ("patch", {"num_experts": 2}),
    ("weighting", {"name": "min_snr"}),
]


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize(("part", "given"), FOLLOWED, ids=str)
def test_what_is_not_given_follows_from_what_is_as_in_python(part, given, is_file, tmp_path):
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({part: given}))
    arguments = [f"--{part}.{name}={value}" for name, value in given.items()]
    config, resolved = app._parse("train", ["--config", str(tmp_path / "given.yaml")] if is_file else arguments)
    expected = get_type_hints(type(config))[part](**given)
    assert getattr(config, part) == expected
    (tmp_path / "run.yaml").write_text(resolved)
    assert yaml.safe_load(resolved)[part].items() <= dataclasses.asdict(expected).items()
    assert app._parse("train", ["--config", str(tmp_path / "run.yaml")])[0] == config
