"""The base, the models beside it, and what a step costs with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, write_json
from stagepatch.core.processes import processes
from stagepatch.diffusion import make_sampler
from stagepatch.diffusion.steps import takes_timesteps
from stagepatch.evaluation import LatentSampling
from stagepatch.families import sample_shape
from stagepatch.sampling import Experts, ExpertSource, SamplingConfig, generate, load_expert
from stagepatch.sampling.experts import BASE
from stagepatch.search.costs import median_seconds, step_of
from stagepatch.search.journal import weights_digest
from stagepatch.search.model_schedule import NONE, Choices, Space
from stagepatch.search.schedule_config import ScheduleConfig

_ROUNDS = 15


@dataclass
class Zoo:
    """What schedules are made of.

    Args:
        base: the first of the models.
        scheduler: the one that the base was trained with.
        sources: of the models, by number.
        models: None for the base.
        timesteps: to choose among, from noise to image.
        sampling: how schedules are sampled.
        latents: how a model of latents is sampled.
    """

    base: nn.Module
    scheduler: Any
    sources: list[ExpertSource]
    models: list[nn.Module | None]
    timesteps: list[float]
    sampling: SamplingConfig
    latents: LatentSampling | None

    @property
    def names(self) -> list[str]:
        """Of the models, by number."""
        return [source.name for source in self.sources]

    @property
    def batch(self) -> int:
        """Images of sampling's first batch."""
        return min(self.sampling.batch_size, self.sampling.num_images)

    def experts(self, choices: Choices) -> Experts:
        """A schedule, to be attached to the base."""
        steps = [
            (timestep, self.models[choice], self.names[choice])
            for timestep, choice in zip(self.timesteps, choices, strict=True)
            if choice != NONE
        ]
        return Experts.at_steps(steps, self.scheduler.config.num_train_timesteps, self.sampling.scheduler)

    def space(self, config: ScheduleConfig, costs: list[float]) -> Space:
        """The schedules within the config's budget."""
        budget = config.budget * costs[0] * len(self.timesteps)
        return Space(tuple(costs), len(self.timesteps), budget, config.drop_steps)

    def costs(self, path: Path) -> list[float]:
        """Seconds per image of a step with each model: out of a file, or measured and written to it.

        Raises:
            UserError: the file is of other models.
        """
        if path.exists():
            saved = read_json(path).get("seconds")
            if not isinstance(saved, dict) or list(saved) != self.names:
                raise UserError(f"'{path}' has not the costs of {', '.join(self.names)}: delete it to measure them.")
            return [float(saved[name]) for name in self.names]
        shape = sample_shape(self.base) if self.latents is None else self.latents.shape
        step = step_of(self.base, self.sampling, self.timesteps[0], shape, self.latents)
        models = {name: model or self.base for name, model in zip(self.names, self.models, strict=True)}
        measured = median_seconds({name: _bound(step, model) for name, model in models.items()}, _ROUNDS)
        seconds = {name: value / self.batch for name, value in measured.items()}
        write_json(path, {"device": str(processes().device), "batch_size": self.batch, "seconds": seconds})
        return list(seconds.values())

    def seconds(self, runs: dict[str, tuple[SamplingConfig, Experts | None]], rounds: int = 3) -> dict[str, float]:
        """Measured seconds per image of whole sampling runs, decoding left out."""

        def call(sampling: SamplingConfig, experts: Experts | None) -> None:
            first = {**vars(sampling), "num_images": self.batch}
            more: dict[str, Any] = (
                {} if self.latents is None else {"shape": self.latents.shape, "captions": self.latents.captions}
            )
            handle = None if experts is None else experts.attach(self.base)
            generate(self.base, self.scheduler, SamplingConfig(**first), **more)
            if handle is not None:
                handle.detach()

        calls = {name: _bound(call, *run) for name, run in runs.items()}
        return {name: value / self.batch for name, value in median_seconds(calls, rounds).items()}

    def settings(self, config: ScheduleConfig) -> dict[str, Any]:
        """All that decides what a search finds."""
        elsewhere = ("output_dir", "evaluations", "cache", "seeds", "zoo")
        values = {name: value for name, value in vars(config).items() if name not in elsewhere}
        places = [config.model, *(entry.learned or entry.model for entry in config.zoo)]
        digests = {name: weights_digest(place) for name, place in zip(self.names, places, strict=True)}
        return {**values, "zoo": self.names, "weights": digests, "timesteps": self.timesteps}


def _bound(call: Callable[..., object], *args: Any) -> Callable[[], object]:
    return lambda: call(*args)


def load_zoo(config: ScheduleConfig, base: nn.Module, scheduler: Any, latents: LatentSampling | None) -> Zoo:
    """The models of a config.

    Raises:
        UserError: two of one name, an entry of no model or two, one that does not fit the base, or a sampler that
            cannot leave out steps.
    """
    entries = config.zoo
    if not entries and not config.drop_steps:
        raise UserError("There is nothing to choose: give a zoo, or let steps be left out with drop_steps=true.")
    for number, entry in enumerate(entries):
        if entry.name in (BASE, "", *(other.name for other in entries[:number])):
            raise UserError(
                f"The zoo's name '{entry.name}' is empty, or taken, or '{BASE}': give each one of its own."
            )
        if bool(entry.model) == bool(entry.learned):
            raise UserError(f"The zoo's '{entry.name}' must have one of `model` and `learned`.")
    sources = [ExpertSource(model=config.model)]
    sources += [ExpertSource(entry.name, entry.learned, entry.model) for entry in entries]
    models = [None, *(load_expert(source, base, scheduler) for source in sources[1:])]
    sources[0] = ExpertSource()
    return Zoo(base, scheduler, sources, models, _timesteps(config, scheduler), config.sampling, latents)


def _timesteps(config: ScheduleConfig, scheduler: Any) -> list[float]:
    """The steps to choose among: those that the sampler takes by itself."""
    name, count = config.sampling.scheduler, config.sampling.num_inference_steps
    sampler = make_sampler(name, scheduler)
    if config.drop_steps and not takes_timesteps(sampler):
        raise UserError(
            f"'{name}' can be told no timesteps, so that none can be left out: use 'dpmsolver++', 'euler' or 'ddpm', "
            f"or set drop_steps=false."
        )
    try:
        sampler.set_timesteps(count)
    except ValueError as error:
        raise UserError(f"'{name}' cannot sample in {count} steps: {error}") from error
    timesteps = [round(float(timestep), 4) for timestep in sampler.timesteps]
    if len(timesteps) != count or sorted(set(timesteps), reverse=True) != timesteps:
        raise UserError(
            f"'{name}' calls the model otherwise than once at each of {count} falling timesteps: use another."
        )
    return [int(timestep) if timestep.is_integer() else timestep for timestep in timesteps]
