"""Experts out of a YAML file, the model schedule: which model denoises which steps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from stagepatch.checkpoints import BUNDLED, is_offloaded, is_plain, load_denoiser
from stagepatch.core import UserError, as_user_error, read_yaml, write_text
from stagepatch.diffusion import check_tells_timesteps
from stagepatch.families import input_dtype
from stagepatch.methods import LoRA, open_learned
from stagepatch.patch import patches_on
from stagepatch.sampling.experts import BASE, ExpertRange, Experts, check_fits, experts_on

NUMBER, TEXT, _LIST = "a number", "a text", "a list of at least one entry"
_TYPES = {NUMBER: (int, float), TEXT: (str,), _LIST: (list,)}
_FILE = {"experts": _LIST, "steps": _LIST, "scheduler": TEXT, "fuse": TEXT}
_NAMED = {"name": TEXT, "learned": TEXT, "model": TEXT}
_RANGE = {"from": NUMBER, "to": NUMBER, **_NAMED}
_STEP = {"timestep": NUMBER, "expert": TEXT}


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert comes from; neither is the base itself.

    Args:
        name: for messages.
        learned: directory of a patch, a LoRA or weights, on top of the base, or of `model`.
        model: a model directory, a Hub id, 'digits' or 'fashion'.
    """

    name: str = BASE
    learned: str = ""
    model: str = ""


def load_experts(path: str | Path, model: nn.Module, scheduler: Any, learned: str = "") -> Experts:
    """The experts of a file, on a model's device and in its dtype, to be attached to it.

    A patch or a LoRA shares the model's memory. A directory that is named twice is loaded once.

    Args:
        path: YAML; see docs/experts.md.
        model: the base.
        scheduler: the one that the base was trained with.
        learned: directory of a patch, a LoRA or weights, to be put on each expert.

    Raises:
        UserError: no such file, a mistake in it, or an expert that does not fit the base.
    """
    check_tells_timesteps(scheduler, f"'{path}'")
    experts = read_schedule(Path(path), scheduler.config.num_train_timesteps, learned)
    loaded: dict[tuple[str, str], nn.Module | None] = {}

    def load(source: ExpertSource) -> nn.Module | None:
        place = (whole_path(source.learned), whole_path(source.model))
        if place not in loaded:
            loaded[place] = load_expert(source, model, scheduler)
        return loaded[place]

    return replace(experts, ranges=[replace(each, denoiser=load(each.denoiser)) for each in experts.ranges])


def whole_path(source: str, directory: str | Path = "") -> str:
    """A local directory's, relative to another one; a Hub id, 'digits' and '' stay."""
    is_local = source not in ("", *BUNDLED) and Path(directory, source).is_dir()
    return str(Path(directory, source).resolve()) if is_local else source


def load_expert(source: ExpertSource, model: nn.Module, scheduler: Any) -> nn.Module | None:
    """One expert, on the base's device and in its dtype; None for the base itself.

    Raises:
        UserError: it cannot be loaded, or was trained on another noise schedule or target than the base.
    """
    expert: nn.Module | None = None
    with as_user_error(f"The expert '{source.name}'", UserError):
        if source.model:
            expert, own_scheduler = load_denoiser(source.model, input_dtype(model))
            check_trained_alike(own_scheduler, scheduler)
            expert = expert.to(next(model.parameters()).device)
            check_fits(model, expert)
        if source.learned:
            artifact = open_learned(Path(source.learned))
            if expert is None:
                expert = _copy(model, shares_memory="weights" not in artifact.kind)
            method = artifact.put_on(expert)
            if isinstance(method, LoRA):
                # On the base not for good: experts that are attached keep the merged weights of one range.
                method.fuse() if source.model else method.merge()
            expert.eval()
    return expert


def _copy(model: nn.Module, shares_memory: bool) -> nn.Module:
    """Another model of the same weights; with memory of its own, or with the same."""
    if patches_on(model) or experts_on(model):
        raise UserError(
            "what was learned goes on the bare model, and that has a patch or experts: detach these first."
        )
    if is_offloaded(model):
        raise UserError("its weights would be moved apart from those of the model: leave memory.group_offload out.")
    shared: dict[int, Any] = {}
    if shares_memory:
        # Quantised weights, and such as are cast where they are, are more than their numbers.
        plain = [value for value in model.parameters() if is_plain(value)]
        shared = {id(value): value for value in model.parameters()}
        shared |= {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in plain}
        shared |= {id(value): value for value in model.buffers()}
    return copy.deepcopy(model, shared)


def check_trained_alike(scheduler: Any, base: Any) -> None:
    """See that a model was trained as the base was, by their schedulers.

    Raises:
        UserError: on another noise schedule, or to predict something else.
    """
    own, theirs = (getattr(each.config, "prediction_type", None) for each in (scheduler, base))
    if own != theirs:
        raise UserError(f"it predicts '{own}', and the base '{theirs}'.")
    none = torch.empty(0)  # a flow has none
    alphas, base_alphas = (getattr(each, "alphas_cumprod", none) for each in (scheduler, base))
    if alphas.shape != base_alphas.shape or not torch.allclose(alphas, base_alphas, atol=1e-4):
        raise UserError("it was trained on another noise schedule than the base.")


def read_schedule(path: Path, total: float, learned: str = "") -> Experts:
    """A file of experts, which are not loaded: each range has an `ExpertSource` as its denoiser.

    Args:
        total: T, where the ranges must end.
        learned: see `load_experts`.

    Raises:
        UserError: no such file, no YAML, or what the mistake is.
    """
    content = read_yaml(path, "schedule")
    with as_user_error(f"'{path}'", UserError):
        experts = _parse(content, path.parent, total)
        return (
            replace(experts, ranges=[_with_learned(each, learned) for each in experts.ranges]) if learned else experts
        )


def _with_learned(expert: ExpertRange, learned: str) -> ExpertRange:
    if expert.denoiser.learned:
        raise UserError(f"the expert '{expert.name}' has '{expert.denoiser.learned}' on it, so '{learned}' cannot be.")
    return replace(expert, denoiser=replace(expert.denoiser, learned=learned))


def _parse(content: Any, directory: Path, total: float) -> Experts:
    values = check_keys(content, _FILE, "the file", "experts")
    has_steps = "steps" in values
    if "scheduler" in values and not has_steps:
        raise UserError("`scheduler` goes with `steps`; with ranges, --sampling.scheduler chooses the sampler.")
    if has_steps and "fuse" in values:
        raise UserError("`fuse` goes with ranges that overlap; a step has one expert.")
    sources = []
    for number, entry in enumerate(values["experts"], 1):
        if has_steps and isinstance(entry, dict) and {"from", "to"} & set(entry):
            raise UserError(f"expert {number} has a range, and the file has steps: give one or the other.")
        keys, required = (_NAMED, ("name",)) if has_steps else (_RANGE, ("from", "to"))
        sources.append(_source(check_keys(entry, keys, f"expert {number}", *required), directory, number))
    if has_steps:
        return Experts.at_steps(_steps(values["steps"], sources, total), total, values.get("scheduler", ""))
    bounds = [(entry["from"], entry["to"]) for entry in values["experts"]]
    ranges = [ExpertRange(*each, source, source.name) for each, source in zip(bounds, sources, strict=True)]
    experts = Experts(ranges, fuse=values.get("fuse", ""))
    end = max(expert.end for expert in ranges)
    if end != total:
        raise UserError(f"The experts' ranges end at {end:g}; the model has timesteps 0 to {total:g}.")
    return experts


def _steps(entries: list[Any], sources: list[ExpertSource], total: float) -> list[tuple[float, ExpertSource, str]]:
    experts = {source.name: source for source in sources}
    if len(experts) < len(sources):
        raise UserError("two experts have one name.")
    steps: list[tuple[float, ExpertSource, str]] = []
    for number, entry in enumerate(entries, 1):
        step = check_keys(entry, _STEP, f"step {number}", *_STEP)
        timestep, name = step["timestep"], step["expert"]
        if name not in experts:
            raise UserError(f"step {number} has no expert '{name}' to go to. Experts: {', '.join(experts)}.")
        if not 0 <= timestep <= total or (steps and timestep >= steps[-1][0]):
            raise UserError(f"step {number} is at timestep {timestep:g}: they must fall, within 0 to {total:g}.")
        steps.append((timestep, experts[name], name))
    return steps


def check_keys(entry: Any, keys: dict[str, str], where: str, *required: str) -> dict[str, Any]:
    """An entry of the file whose keys, and the types of their values, are those of a table.

    Raises:
        UserError: they are not.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where} holds {type(entry).__name__}, not keys such as `{required[0]}`.")
    for key, value in entry.items():
        if key not in keys:
            raise UserError(f"{where} has no key '{key}'. Keys: {', '.join(keys)}.")
        if isinstance(value, bool) or not isinstance(value, _TYPES[keys[key]]) or value in ("", []):
            raise UserError(f"{where}: `{key}` is {value!r}: give {keys[key]}.")
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise UserError(f"{where}: `{key}` must be finite, and fit in 64 bits.")
    for key in required:
        if key not in entry:
            raise UserError(f"{where} lacks `{key}`.")
    return entry


def _source(entry: dict[str, Any], directory: Path, number: int) -> ExpertSource:
    """A path is the file's neighbour where there is such a directory."""
    learned, model = entry.get("learned", ""), entry.get("model", "")
    name = entry.get("name") or " with ".join(filter(None, (model, learned))) or BASE
    return ExpertSource(name, whole_path(learned, directory), whole_path(model, directory))


def write_schedule(
    path: Path, experts: Sequence[ExpertSource], steps: Sequence[tuple[float, int]], scheduler: str, comment: str
) -> None:
    """Write steps and the experts that they use; local directories by their whole paths."""
    used = [experts[number] for number in sorted({number for _, number in steps})]
    entries = [(each.name, whole_path(each.learned), whole_path(each.model)) for each in used]
    content = {
        "scheduler": scheduler,
        "experts": [{key: value for key, value in zip(_NAMED, entry, strict=True) if value} for entry in entries],
        "steps": [{"timestep": timestep, "expert": experts[number].name} for timestep, number in steps],
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    write_text(path, f"# {comment}\n{text}")
