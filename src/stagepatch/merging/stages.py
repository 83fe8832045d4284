"""The stages of a merge: where they are, of what kind, and what they were trained from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagepatch.checkpoints import find_model, model_fingerprint
from stagepatch.core import UserError
from stagepatch.merging.config import SUM, MergeMethod
from stagepatch.merging.lora import merge_loras
from stagepatch.merging.models import merge_models
from stagepatch.methods import Artifact, open_artifact

_RANGES = "in its own range of timesteps: stagepatch sample --schedule."
_NOT_MERGED = {
    "patch": f"is a patch: patches are not merged. Use each {_RANGES}",
    "weights and patch": f"holds weights with a patch on them, and patches are not merged. Use each {_RANGES}",
    "weights": f"holds some of a model's weights, not a model: merge whole models, or LoRAs; or use each {_RANGES}",
}


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

    def merge(
        self, weights: Sequence[float], output: Path, method: MergeMethod = SUM, fishers: Sequence[Path] = ()
    ) -> None:
        """`merge_models`, or `merge_loras`.

        Raises:
            UserError: other than one weight a stage, or stages of different architectures.
        """
        if self.are_loras:
            merge_loras(self.directories, weights, output, method)
        else:
            merge_models(find_model(self.base), self.directories, weights, output, method, fishers)


def merge(
    stages: Sequence[str | Path],
    weights: Sequence[float],
    output: str | Path,
    base: str = "",
    ties_keep: float = 0.0,
    method: MergeMethod | None = None,
    fishers: Sequence[str | Path] = (),
) -> None:
    """Merge models, or LoRAs, into one; see `find_stages`, `merge_models` and `merge_loras`.

    Args:
        output: directory of the merged model, or LoRA.
        ties_keep: of TIES, where no method is given.
        fishers: of method 'fisher', files that `write_fisher` wrote, one a stage.
    """
    method = method or MergeMethod(ties_keep=ties_keep)
    find_stages(base, list(map(str, stages))).merge(weights, Path(output), method, list(map(Path, fishers)))


def find_stages(base: str, stages: Sequence[str], needs_base: bool = False) -> Stages:
    """Some stages, or all that one run of `stagepatch decouple` made.

    Args:
        base: a model directory, a Hub id, 'digits' or 'fashion'; empty for what the stages name.
        stages: directories, or one that has them in 'stages/'.
        needs_base: LoRAs need theirs too, as models always do.

    Raises:
        UserError: no stages, patches among them, models and LoRAs mixed, or a stage that was trained from another
            base.
    """
    if len(stages) == 1 and (Path(stages[0]) / "stages").is_dir():
        directories = numbered_stages(Path(stages[0]))
    else:
        directories = [find_model(stage) for stage in stages]
    if not directories:
        raise UserError("No stages to merge: give stages, or the output_dir of `stagepatch decouple` as the only one.")
    found = [open_artifact(directory) for directory in directories]
    for artifact in found:
        if artifact.kind in _NOT_MERGED:
            raise UserError(f"'{artifact.path}' {_NOT_MERGED[artifact.kind]}")
        artifact.require("model", "LoRA")
    kinds = {artifact.kind: artifact.path for artifact in found}
    if len(kinds) > 1:
        raise UserError(f"'{kinds['LoRA']}' is a LoRA and '{kinds['model']}' a model: merge those of one kind.")
    needs_base = needs_base or "model" in kinds
    base = _checked_base(base, found, needs_base)
    if needs_base and not base:
        raise UserError("No base to merge the stages into: give base, the model that they were trained from.")
    return Stages(base, tuple(directories), "LoRA" in kinds)


def numbered_stages(directory: Path) -> list[Path]:
    """The directories in the 'stages/' of what `stagepatch decouple` wrote, by number.

    Raises:
        UserError: there are none.
    """
    found = [path for path in directory.glob("stages/*") if path.is_dir() and path.name.isdecimal()]
    if not found:
        raise UserError(
            f"'{directory}' has no 'stages/0', 'stages/1', …: give directories of stages, or one that has these."
        )
    return sorted(found, key=lambda path: int(path.name))


def _checked_base(base: str, stages: Sequence[Artifact], needs_base: bool) -> str:
    """The base; where none is given, the one that all stages name."""
    named = {artifact.path: artifact.stage["base"] for artifact in stages if artifact.stage}
    if not named:
        return base
    first, is_read = next(iter(named.values())), bool(base) or needs_base
    if not base and len(named) == len(stages):
        base = str(first["source"])
    expected = model_fingerprint(find_model(base)) if base and is_read else str(first["fingerprint"])
    for stage, theirs in named.items():
        if theirs["fingerprint"] != expected:
            raise UserError(
                f"The stage '{stage}' was trained from another base: from '{theirs['source']}' (weights "
                f"{theirs['fingerprint'][:12]}), not from '{base or first['source']}' (weights {expected[:12]}). Give "
                f"the base that it was trained from, or leave that stage out."
            )
    return base
