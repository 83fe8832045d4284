"""Experts out of a YAML file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from stagepatch.checkpoints import load_denoiser
from stagepatch.checkpoints.loading import BUNDLED
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_text
from stagepatch.methods import load_learned
from stagepatch.methods.weights import WEIGHTS_NAME
from stagepatch.patch import patches_on
from stagepatch.sampling.experts import BASE, ExpertRange, Experts, check_fits, check_ranges, experts_on

_KEYS = ("experts", "steps", "scheduler")
_RANGE, _NAMED, _STEP = (
    ("from", "to", "name", "learned", "model"),
    ("name", "learned", "model"),
    ("timestep", "expert"),
)


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert comes from; neither is the base itself.

    Args:
        name: for messages.
        learned: directory of a patch, a LoRA or weights, on top of the base.
        model: a model directory, a Hub id, or 'digits'.
    """

    name: str = BASE
    learned: str = ""
    model: str = ""


@dataclass(frozen=True)
class Schedule:
    """What a file of experts says.

    Args:
        experts: where each comes from.
        ranges: start, end, and the expert's number.
        steps: timestep, and the expert's number; empty where ranges are given.
        scheduler: of the steps.
    """

    experts: tuple[ExpertSource, ...]
    ranges: tuple[tuple[float, float, int], ...] = ()
    steps: tuple[tuple[float, int], ...] = ()
    scheduler: str = ""


def load_experts(path: str | Path, model: nn.Module, scheduler: Any) -> Experts:
    """The experts of a file, on a model's device and in its dtype, to be attached to it.

    A patch or a LoRA shares the model's memory. A directory that is named twice is loaded once.

    Args:
        path: YAML; see docs/experts.md.
        model: the base.
        scheduler: the one that the base was trained with.

    Raises:
        UserError: no such file, a mistake in it, or an expert that does not fit the base.
    """
    path = Path(path)
    total = int(scheduler.config.num_train_timesteps)
    schedule = read_schedule(path, total)
    used = {number for *_, number in schedule.ranges} | {number for _, number in schedule.steps}
    loaded: dict[tuple[str, str], nn.Module | None] = {}
    denoisers: dict[int, nn.Module | None] = {}
    for number in sorted(used):
        source = schedule.experts[number]
        key = (whole_path(source.learned), whole_path(source.model))
        if key not in loaded:
            loaded[key] = load_expert(source, model, scheduler)
        denoisers[number] = loaded[key]
    names = [source.name for source in schedule.experts]
    if schedule.steps:
        steps = [(timestep, denoisers[number], names[number]) for timestep, number in schedule.steps]
        return Experts.at_steps(steps, total, schedule.scheduler)
    return Experts(
        [ExpertRange(start, end, denoisers[number], names[number]) for start, end, number in schedule.ranges]
    )


def whole_path(source: str) -> str:
    """A local directory's; a Hub id, 'digits' and '' stay."""
    return str(Path(source).resolve()) if source not in ("", *BUNDLED) and Path(source).is_dir() else source


def load_expert(source: ExpertSource, model: nn.Module, scheduler: Any) -> nn.Module | None:
    """One expert, on the base's device and in its dtype; None for the base itself.

    Raises:
        UserError: it cannot be loaded, or was trained on another noise schedule or target than the base.
    """
    try:
        if source.model:
            expert, own_scheduler = load_denoiser(source.model)
            _check_trained_alike(own_scheduler, scheduler)
            parameter = next(model.parameters())
            expert = expert.to(parameter.device)
            if next(expert.parameters()).dtype != parameter.dtype:
                expert = expert.to(parameter.dtype)
            check_fits(model, expert)
            return expert  # type: ignore[no-any-return]
        if source.learned:
            learned = Path(source.learned)
            expert = _copy(model, shares_memory=not (learned / WEIGHTS_NAME).exists())
            load_learned(expert, learned)
            return expert.eval()
    except UserError as error:
        raise UserError(f"The expert '{source.name}': {error}") from error
    return None


def _copy(model: nn.Module, shares_memory: bool) -> nn.Module:
    """Another model of the same weights; with memory of its own, or with the same."""
    if patches_on(model) or experts_on(model):
        raise UserError(
            "what was learned goes on the bare model, and that has a patch or experts: detach these first."
        )
    shared: dict[int, Any] = {}
    if shares_memory:
        shared = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()}
        shared |= {id(value): value for value in model.buffers()}
    return copy.deepcopy(model, shared)


def _check_trained_alike(scheduler: Any, base: Any) -> None:
    own, theirs = (getattr(each.config, "prediction_type", None) for each in (scheduler, base))
    if own != theirs:
        raise UserError(f"it predicts '{own}', and the base '{theirs}'.")
    if not _is_same(getattr(scheduler, "alphas_cumprod", None), getattr(base, "alphas_cumprod", None)):
        raise UserError("it was trained on another noise schedule than the base.")


def _is_same(alphas: Tensor | None, base: Tensor | None) -> bool:
    if alphas is None or base is None:  # a flow has none
        return alphas is base
    return alphas.shape == base.shape and torch.allclose(alphas, base, atol=1e-4)


def read_schedule(path: Path, total: float) -> Schedule:
    """A file of experts.

    Args:
        total: T, where the ranges must end.

    Raises:
        UserError: no such file, no YAML, or what the mistake is.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No such schedule: '{path}'.") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read the schedule '{path}': {error}") from error
    try:
        return _parse(content, path.parent, total)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error


def _parse(content: Any, directory: Path, total: float) -> Schedule:
    values = _mapping(content, _KEYS, "the file", "experts")
    if "steps" not in values and "scheduler" in values:
        raise UserError("`scheduler` goes with `steps`; with ranges, --sampling.scheduler chooses the sampler.")
    entries = values["experts"]
    if not isinstance(entries, list) or not entries:
        raise UserError("`experts` must be a list of at least one expert.")
    if "steps" in values:
        return _parse_steps(entries, values, directory, total)
    sources, ranges = [], []
    for number, entry in enumerate(entries):
        where = f"expert {number + 1}"
        entry = _mapping(entry, _RANGE, where, "from", "to")
        ranges.append((_number(entry, "from", where), _number(entry, "to", where), number))
        sources.append(_source(entry, directory, where))
    ranges.sort()
    check_ranges([(start, end) for start, end, _ in ranges], total)
    return Schedule(tuple(sources), ranges=tuple(ranges))


def _parse_steps(entries: list[Any], values: dict[str, Any], directory: Path, total: float) -> Schedule:
    sources = []
    for number, entry in enumerate(entries):
        where = f"expert {number + 1}"
        if isinstance(entry, dict) and {"from", "to"} & set(entry):
            raise UserError(f"{where} has a range, and the file has steps: give one or the other.")
        sources.append(_source(_mapping(entry, _NAMED, where, "name"), directory, where))
    numbers = {source.name: number for number, source in enumerate(sources)}
    if len(numbers) < len(sources):
        raise UserError("two experts have one name.")
    if not isinstance(values["steps"], list) or not values["steps"]:
        raise UserError("`steps` must be a list of at least one step.")
    steps: list[tuple[float, int]] = []
    for number, entry in enumerate(values["steps"]):
        where = f"step {number + 1}"
        entry = _mapping(entry, _STEP, where, *_STEP)
        timestep, name = _number(entry, "timestep", where), entry["expert"]
        if name not in numbers:
            raise UserError(f"{where} has no expert '{name}' to go to. Experts: {', '.join(numbers)}.")
        if not 0 <= timestep <= total or (steps and timestep >= steps[-1][0]):
            raise UserError(f"{where} is at timestep {timestep:g}: they must fall, within 0 to {total:g}.")
        steps.append((timestep, numbers[name]))
    scheduler = values.get("scheduler", "")
    if not isinstance(scheduler, str):
        raise UserError(f"`scheduler` is {scheduler!r}: give a sampler's name.")
    return Schedule(tuple(sources), steps=tuple(steps), scheduler=scheduler)


def _mapping(value: Any, known: Sequence[str], where: str, *required: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}, not keys such as `{required[0]}`.")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"{where} has no key '{unknown[0]}'. Keys: {', '.join(known)}.")
    missing = [key for key in required if key not in value]
    if missing:
        raise UserError(f"{where} lacks `{missing[0]}`.")
    return value


def _number(entry: dict[str, Any], key: str, where: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: `{key}` is {value!r}, not a number.")
    return value


def _source(entry: dict[str, Any], directory: Path, where: str) -> ExpertSource:
    for key in ("name", "learned", "model"):
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            raise UserError(f"{where}: `{key}` is {entry[key]!r}: give a text, or leave it out.")
    if "learned" in entry and "model" in entry:
        raise UserError(f"{where} has `learned` and `model`: what was learned goes on the base; give one of them.")
    learned, model = (_beside(entry.get(key, ""), directory) for key in ("learned", "model"))
    return ExpertSource(entry.get("name") or entry.get("learned") or entry.get("model") or BASE, learned, model)


def _beside(source: str, directory: Path) -> str:
    """A path is the file's neighbour where there is such a directory."""
    is_beside = source not in ("", *BUNDLED) and (directory / source).is_dir()
    return str(directory / source) if is_beside else source


def write_schedule(
    path: Path, experts: Sequence[ExpertSource], steps: Sequence[tuple[float, int]], scheduler: str, comment: str
) -> None:
    """Write steps and the experts that they use; local directories by their whole paths."""
    used = sorted({number for _, number in steps})
    sources = []
    for number in used:
        source = experts[number]
        given = {"learned": whole_path(source.learned), "model": whole_path(source.model)}
        sources.append({"name": source.name} | {key: value for key, value in given.items() if value})
    content = {
        "scheduler": scheduler,
        "experts": sources,
        "steps": [{"timestep": timestep, "expert": experts[number].name} for timestep, number in steps],
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    write_text(path, f"# {comment}\n{text}")
