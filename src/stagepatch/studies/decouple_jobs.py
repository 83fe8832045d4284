"""From a config to stages, each a training job; everything that can be refused is refused before any starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stagepatch import checkpoints
from stagepatch.core import STAGE, UserError, as_json, as_user_error, processes, seed_for, write_json, write_text
from stagepatch.data import cache_directory, fit_to_model
from stagepatch.diffusion import (
    Objective,
    TimestepSampler,
    between_levels,
    check_tells_timesteps,
    equal_in_log_snr,
    equal_in_t,
    make_weighting,
    split_at,
)
from stagepatch.methods import STAGE_NAME, Consistent, Finetune, make_method
from stagepatch.models import check_prunable, keep
from stagepatch.patch import with_condition
from stagepatch.sampling import check_fits, check_trained_alike
from stagepatch.studies.decouple_config import DecoupleConfig
from stagepatch.studies.decouple_cost import cost_of, cost_of_model
from stagepatch.studies.decouple_pruning import prune_for
from stagepatch.studies.job import Job
from stagepatch.studies.learned_architectures import LearnedArchitectures
from stagepatch.training import BOOKKEEPING, Run, TrainConfig, make_intervals

STAGES, BRANCHES, ARCHITECTURES, EXPERTS_NAME = "stages", "branches", "architectures", "experts.yaml"
# Of a stage; the rest is its training run's.
_OWN = (
    *("preset", "p", "prune", "prune_budget", "prune_steps", "prune_threshold"),
    *("consistency", "projection", "antithetic"),
)
_PER_RANGE = ("models", "p", "prune")  # may be lists
Range = tuple[float, float]  # of timesteps as the model is told them
_ELSEWHERE = ("output_dir", "cache", "cache_batch_size", "ddo")


@dataclass
class Stage(Job):
    """A range of timesteps as the model is told them, `first` ≤ t < `stop`, and how its copy is trained.

    Args:
        is_flow: they are a flow's, which are told after its shift.
        study: of all stages.
        parent: the branch of a tree that it starts from, and trains first if need be; None where it starts from the
            model.
        architectures: what stays of the model in each range, learned first if need be; None without a budget.
    """

    number: int
    first: float
    stop: float
    is_flow: bool
    config: TrainConfig
    study: DecoupleConfig
    parent: "Stage | None" = None
    architectures: LearnedArchitectures | None = None
    record = STAGE_NAME
    noun = "stage"

    @property
    def branches(self) -> list["Stage"]:
        """What it stands on, from the trunk on."""
        return [] if self.parent is None else [*self.parent.branches, self.parent]

    @property
    def directory(self) -> Path:  # type: ignore[override]
        """Where its result and its training run are."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return f"stage {self.number} (timesteps {self.first:g} to {self.stop - 1:g})"

    def identity(self) -> dict[str, Any]:
        own = {name: self._choice(name) for name in _OWN}
        run = {name: value for name, value in vars(self.config).items() if name not in _ELSEWHERE}
        tree = [[branch.first, branch.stop] for branch in self.branches]
        # A flow's stages were once ranges of T before the shift: what was begun so is not gone on with.
        unit = {"ranges_of": "noise level"} if self.is_flow else {}
        own |= {"spectral": self.study.spectral} if self.study.spectral else {}
        return {**unit, **run, **self.config.learns_by(), **own, "first": self.first, "stop": self.stop, "tree": tree}

    def is_done(self) -> bool:
        return (self.directory / STAGE_NAME).exists()

    def timesteps(self, levels: Tensor) -> TimestepSampler:
        """What it trains on.

        Args:
            levels: noise level of every timestep, [T]: `Objective.levels`.
        """
        total = len(levels)
        ends = between_levels(levels, self.first / total, self.stop / total)
        return TimestepSampler(total, *ends, self._choice("p"), bool(self.study.antithetic))

    def _choice(self, name: str) -> Any:
        """A value of the study's, of this stage where it is one for each."""
        value = getattr(self.study, name)
        return value[self.number] if name in _PER_RANGE and isinstance(value, list) else value

    def work(self) -> None:
        for before in (self.parent, self.architectures):
            if before is not None:
                before.run()
        processes().wait_for_everyone()
        run = Run(self.config, identity=self.identity())
        timesteps, original = self.timesteps(run.objective.levels), None
        if ratio := self._choice("prune"):
            original = run.model
            run.model = prune_for(run, timesteps, ratio, self.study.prune_threshold)
        if self.architectures is not None:
            original = run.model
            run.model = keep(run.model, self.architectures.read(self.number))
        if self.study.projection:
            checkpoints.add_projections(run.model)
        if self.config.method == "finetune":
            run.method = Finetune(run.scheduler)
        if self.parent is not None:
            run.start_from = self.parent.directory
        run.objective.timesteps = timesteps
        learned = run.method
        if self.study.consistency or self.study.spectral:
            run.method = Consistent(learned, self.study.consistency or 0.0, original, self.study.spectral)
        run.train(progress=self.study.stage >= 0)
        if processes().is_main_process:
            if self.study.projection:
                checkpoints.fold_projections(run.model)
                learned.save(self.directory)
            cost = {}
            if self.study.prune or self.study.prune_budget or self.study.models:
                own, base = (
                    cost_of(run.model, run.objective, run.dataset),
                    cost_of_model(self.study.model, run.dataset),
                )
                cost = {"cost": own, "base_cost": base}
            write_json(self.directory / STAGE_NAME, self._facts() | cost)

    def _facts(self) -> dict[str, Any]:
        """What merging and model schedules need to know of it."""
        model = self.config.model
        base = {"source": model, "fingerprint": checkpoints.model_fingerprint(checkpoints.find_model(model))}
        return {"number": self.number, "from": self.first, "to": self.stop, "base": base, **as_json(self.identity())}


def plan_stages(config: DecoupleConfig) -> list[Stage]:
    """The stages, from the image's end to the noise's.

    Raises:
        UserError: ranges that cannot be had, a method that the model cannot take, or a `stage` that is not there.
    """
    config = replace(config, data=fit_to_model(config.data, config.model))
    scheduler = checkpoints.load_scheduler(config.model)
    check_tells_timesteps(scheduler, "A copy for each range")
    model = checkpoints.build_denoiser(config.model)
    config = replace(config, patch=with_condition(config.patch, model))
    make_method(config).prepare(model)
    if config.prune or config.prune_budget:
        for place in config.models or [config.model]:
            check_prunable(checkpoints.build_denoiser(place))
    for place in config.models:
        _check_alike(place, config.model)
    objective = Objective(scheduler, weighting=make_weighting(config.weighting))
    total = objective.num_train_timesteps

    def told(timestep: int) -> float:
        if timestep in (0, total) or not objective.is_flow:
            return timestep
        return round(float(objective.levels[timestep]) * total, 3)  # as exactly as experts look

    def split(count: int) -> list[Range]:
        if config.split == "log_snr":
            ranges = equal_in_log_snr(objective.snr(torch.arange(total)), count)
            return [(told(first), told(stop)) for first, stop in ranges]
        if config.split == "gradient":
            by_gradient = replace(config.balancing, clustering="gradient", num_intervals=count)
            return [(told(first), told(stop)) for first, stop in make_intervals(by_gradient, objective).intervals]
        return list(equal_in_t(total, count))

    if config.tree:
        grown = plan_tree(config.tree, split)
    else:
        ranges = list(split_at(total, config.boundaries)) if config.boundaries else split(config.num_stages)
        grown = [[ends] for ends in ranges]
    for name in _PER_RANGE:
        values = getattr(config, name)
        if isinstance(values, list) and len(values) != len(grown) and (values or name != "models"):
            raise UserError(f"{name} has {len(values)} values for {len(grown)} ranges: give one for each.")
    if not -1 <= config.stage < len(grown):
        raise UserError(f"stage={config.stage} is none of 0 to {len(grown) - 1}; -1 is all.")
    stages = [_grow(config, number, ranges, objective.is_flow) for number, ranges in enumerate(grown)]
    for stage in stages:
        for each in (*stage.branches, stage):
            each.timesteps(objective.levels)
            each.check_directory(DecoupleConfig(), BOOKKEEPING)
    if config.prune_budget:
        timesteps = [stage.timesteps(objective.levels) for stage in stages]
        architectures = LearnedArchitectures(_run_config(config, ARCHITECTURES, len(stages)), config, timesteps)
        architectures.check_directory(DecoupleConfig(), BOOKKEEPING)
        for stage in stages:
            stage.architectures = architectures
    return stages


def _check_alike(source: str, base: str) -> None:
    """See that a model can be an expert beside the base.

    Raises:
        UserError: it takes or gives something else, or has no VAE where the base has one.
    """
    with as_user_error(f"models: '{source}'", UserError):
        check_trained_alike(checkpoints.load_scheduler(source), checkpoints.load_scheduler(base))
        check_fits(checkpoints.build_denoiser(base), checkpoints.build_denoiser(source))
        if checkpoints.has_vae(source) != checkpoints.has_vae(base):
            raise UserError("it and the base do not both have a vae/: put it beside its transformer/ or unet/.")


def plan_tree(levels: Sequence[int], split: Callable[[int], list[Range]]) -> list[list[Range]]:
    """The experts of a binary tree whose ends alone are grown (eDiff-I, arXiv 2211.01324, Section 4.1).

    The paper's experts are E³₀, E⁹₅₁₁ and one for all between, and a child starts from its parent: so says a summary
    of it; its text we could not get. Our reading: each level halves the distribution of noise levels in training,
    every level towards an end is trained, all alike, and the expert between starts from the trunk.

    Args:
        levels: of the image's end and of the noise's.
        split: T in so many ranges.

    Returns:
        An expert's ranges, each within the one before, of which the last is its own; from the image's end to the
        noise's.

    Raises:
        UserError: ranges that hold no timestep.
    """

    def ends(level: int) -> tuple[Range, Range]:
        try:
            ranges = split(2**level)
        except UserError as error:
            raise UserError(f"tree={list(levels)}: 2^{level} ranges are more than there is room for.") from error
        return ranges[0], ranges[-1]

    low = [ends(level)[0] for level in range(1, levels[0] + 1)]
    high = [ends(level)[1] for level in range(1, levels[1] + 1)]
    first, stop = (low[-1][1] if low else 0), (high[-1][0] if high else split(1)[0][1])
    return [ranges for ranges in (low, [(first, stop)] if first < stop else [], high) if ranges]


def _grow(config: DecoupleConfig, number: int, ranges: Sequence[Range], is_flow: bool) -> Stage:
    """A stage, on the branches that lead to it."""
    stage = None
    for level, ends in enumerate(ranges[:-1], 1):
        place = f"{BRANCHES}/{number}-{level}"
        stage = Stage(number, *ends, is_flow, _run_config(config, place, number, level), config, stage)
    return Stage(number, *ranges[-1], is_flow, _run_config(config, f"{STAGES}/{number}", number), config, stage)


def _run_config(config: DecoupleConfig, place: str, *numbers: int) -> TrainConfig:
    """Of a stage or branch. From common draws, task vectors would share their noise, which then does not average out
    in a merge: each has a seed of its own, of its numbers."""
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    training = config.training.resolve(config.preset)
    training.snapshot_every, training.seed = 0, seed_for(STAGE, training.seed, *numbers)
    values |= {"output_dir": str(Path(config.output_dir) / place), "training": training}
    if config.models:
        values["model"] = config.models[numbers[0]]
    values["ddo"] = replace(config.ddo, fakes=config.ddo.fakes or str(Path(config.output_dir) / "fakes"))  # for all
    return TrainConfig(**values | {"cache": str(cache_directory(config.cache, config.output_dir))})


def write_experts(stages: list[Stage], path: Path) -> None:
    """The file of experts that uses each stage in its range; directories relative to the file's own."""
    kind = "model" if stages[0].config.method == "finetune" else "learned"
    experts = [{"from": stage.first, "to": stage.stop, kind: f"{STAGES}/{stage.number}"} for stage in stages]
    write_text(path, yaml.safe_dump({"experts": experts}, sort_keys=False))
