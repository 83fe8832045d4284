"""The stages of a merge: where they are, of what kind, and what they were trained from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stagepatch.checkpoints.fingerprint import model_fingerprint
from stagepatch.checkpoints.loading import find_model
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, write_json
from stagepatch.merging.lora import merge_loras
from stagepatch.methods.config import LoRAConfig
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.methods.weights import WEIGHTS_NAME

# `stagepatch decouple` writes a directory a stage under this one, and in each a file that says what it is.
_STAGES, _FACTS = "stages", "stage.json"


@dataclass(frozen=True)
class Stages:
    """What is merged.

    Args:
        base: the model that all were trained from; may be empty for LoRAs whose base is not needed.
        directories: of models, or of LoRAs.
        are_loras: which of them.
    """

    base: str
    directories: tuple[Path, ...]
    are_loras: bool


def find_stages(base: str, stages: Sequence[str], needs_base: bool = False) -> Stages:
    """The stages as given, or all that one run of `stagepatch decouple` made.

    Args:
        base: a model directory, a Hub id or 'digits'; empty for what the stages name.
        needs_base: LoRAs need theirs too, as models always do.

    Raises:
        UserError: no stages, patches among them, models and LoRAs mixed, or a stage that was trained from another
            base.
    """
    directories = _directories(stages)
    if not directories:
        raise UserError("No stages to merge: give stages, or the output_dir of `stagepatch decouple` as the only one.")
    are_loras = [_is_lora(directory) for directory in directories]
    if len(set(are_loras)) > 1:
        lora, model = directories[are_loras.index(True)], directories[are_loras.index(False)]
        raise UserError(f"'{lora}' is a LoRA and '{model}' a model: merge those of one kind.")
    needs_base = needs_base or not are_loras[0]
    base = _checked_base(base, directories, needs_base)
    if needs_base and not base:
        raise UserError("No base to merge the stages into: give base, the model that they were trained from.")
    return Stages(base, tuple(directories), are_loras[0])


def _directories(stages: Sequence[str]) -> list[Path]:
    if len(stages) == 1 and (Path(stages[0]) / _STAGES).is_dir():
        numbered = [path for path in (Path(stages[0]) / _STAGES).iterdir() if path.name.isdecimal()]
        return sorted(numbered, key=lambda path: int(path.name))
    return [find_model(stage) for stage in stages]


def _is_lora(directory: Path) -> bool:
    if (directory / LORA_CONFIG).exists():
        return True
    if (directory / "config.json").exists() and "patch" in read_json(directory / "config.json"):
        raise UserError(
            f"'{directory}' is a patch: patches are not merged. Use each in its own range of timesteps: "
            f"stagepatch sample --schedule."
        )
    if (directory / WEIGHTS_NAME).exists():
        raise UserError(
            f"'{directory}' holds some of a model's weights, not a model: merge whole models, or LoRAs; or use each "
            f"in its own range of timesteps: stagepatch sample --schedule."
        )
    return False


def _checked_base(base: str, directories: Sequence[Path], needs_base: bool) -> str:
    """The base; where none is given, the one that all stages name."""
    named = {stage: read_json(stage / _FACTS)["base"] for stage in directories if (stage / _FACTS).exists()}
    if not named:
        return base
    first = next(iter(named.values()))
    is_given = bool(base)
    if not is_given and len(named) == len(directories):
        base = str(first["source"])
    is_read = base and (is_given or needs_base)
    expected = model_fingerprint(find_model(base)) if is_read else str(first["fingerprint"])
    for stage, theirs in named.items():
        if theirs["fingerprint"] != expected:
            raise UserError(
                f"The stage '{stage}' was trained from another base: from '{theirs['source']}' (weights "
                f"{theirs['fingerprint'][:12]}), not from '{base or first['source']}' (weights {expected[:12]}). Give "
                f"the base that it was trained from, or leave that stage out."
            )
    return base


def merge_lora_stages(stages: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """`merge_loras` of directories into a directory."""
    merge_loras([stage / LORA_FILE for stage in stages], weights, output / LORA_FILE)
    configs = [LoRAConfig(**read_json(stage / LORA_CONFIG)) for stage in stages]
    write_json(
        output / LORA_CONFIG, asdict(replace(configs[0], rank=sum(config.rank for config in configs), min_rank=0))
    )
