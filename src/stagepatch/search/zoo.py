"""The base, the models beside it, and what a step costs with each."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from stagepatch.checkpoints.fingerprint import files_fingerprint
from stagepatch.checkpoints.layout import find_model
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, write_json
from stagepatch.core.processes import processes
from stagepatch.diffusion import make_sampler
from stagepatch.diffusion.samplers import takes_timesteps
from stagepatch.evaluation import LatentSampling
from stagepatch.families import sample_shape
from stagepatch.sampling import Experts, ExpertSource, SamplingConfig, balanced_labels, generate, load_expert
from stagepatch.sampling.experts import BASE
from stagepatch.sampling.generate import conditions, guided
from stagepatch.search.config import ScheduleConfig
from stagepatch.search.model_schedule import NONE, Choices, Space

_ROUNDS = 15


@torch.no_grad()
def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each call's median time. The calls take turns, so that what slows the machine for a while slows all; one round
    before goes uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = _now()
            call()
            if number:
                seconds[name].append(_now() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Sampled:
    """How the base is sampled: by itself, or with a model schedule.

    Args:
        seconds: per image, predicted of the costs.
    """

    sampling: SamplingConfig
    experts: Experts | None
    seconds: float

    def attached(self, base: nn.Module) -> AbstractContextManager[object]:
        """The experts on the base, until the end of a `with` block."""
        return nullcontext() if self.experts is None else self.experts.attach(base)


class Zoo:
    """What model schedules are made of.

    Args:
        config: the models beside the base, the steps to choose among, and the budget. Costs are measured once, and
            kept in its output_dir.
        base: the first of the models.
        scheduler: the one that the base was trained with.
        latents: how a model of latents is sampled.

    Attributes:
        sources: of the models, by number.
        names: of the models, by number.
        timesteps: to choose among, from noise to image.
        space: the model schedules within the budget.

    Raises:
        UserError: two of one name, an entry of no model or two, one that does not fit the base, a sampler that cannot
            leave out steps, or a budget that nothing is within.
    """

    def __init__(
        self, config: ScheduleConfig, base: nn.Module, scheduler: Any, latents: LatentSampling | None
    ) -> None:
        self.config, self.base, self.scheduler = config, base, scheduler
        self._shape, self._captions = (
            (sample_shape(base), None) if latents is None else (latents.shape, latents.captions)
        )
        if not config.zoo and not config.drop_steps:
            raise UserError("There is nothing to choose: give a zoo, or let steps be left out with drop_steps=true.")
        self.names = [BASE]
        for entry in config.zoo:
            if entry.name in ("", *self.names):
                raise UserError(
                    f"The zoo's name '{entry.name}' is empty, or taken, or '{BASE}': give each one of its own."
                )
            if bool(entry.model) == bool(entry.learned):
                raise UserError(f"The zoo's '{entry.name}' must have one of `model` and `learned`.")
            self.names.append(entry.name)
        self.sources = [ExpertSource(), *(ExpertSource(each.name, each.learned, each.model) for each in config.zoo)]
        self._models = [None, *(load_expert(source, base, scheduler) for source in self.sources[1:])]
        self.timesteps = _timesteps(config, scheduler)
        self._batch = min(config.sampling.batch_size, config.sampling.num_images)
        costs = self._costs(Path(config.output_dir) / "costs.json")
        budget = config.budget * costs[0] * len(self.timesteps)
        self.space = Space(costs, len(self.timesteps), budget, config.drop_steps)

    def steps(self, choices: Choices) -> list[tuple[float, int]]:
        """The steps that a model schedule takes, and the model of each."""
        return [(step, model) for step, model in zip(self.timesteps, choices, strict=True) if model != NONE]

    def with_schedule(self, choices: Choices) -> Sampled:
        """The base with a model schedule."""
        steps = [(timestep, self._models[model], self.names[model]) for timestep, model in self.steps(choices)]
        sampling = self.config.sampling
        experts = Experts.at_steps(steps, self.scheduler.config.num_train_timesteps, sampling.scheduler)
        return Sampled(experts.sampling(sampling), experts, self.space.seconds(choices))

    def alone(self, count: int) -> Sampled:
        """The base by itself, at so many steps as the sampler spaces them."""
        return Sampled(replace(self.config.sampling, num_inference_steps=count), None, self.space.costs[0] * count)

    def _costs(self, path: Path) -> tuple[float, ...]:
        """Seconds per image of a step with each model: out of a file, or measured and written to it.

        Raises:
            UserError: the file is of other models.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # processes that share a search must have the same
            if not path.exists():
                write_json(
                    path, {"device": str(processes().device), "batch_size": self._batch, "seconds": self._step()}
                )
            seconds = read_json(path).get("seconds")
        if not isinstance(seconds, dict) or list(seconds) != self.names:
            raise UserError(f"'{path}' has not the costs of {', '.join(self.names)}: delete it to measure them.")
        return tuple(map(float, seconds.values()))

    def _step(self) -> dict[str, float]:
        """Seconds per image of a step such as sampling's first batch makes, guidance included, with each model."""
        device: Any = next(self.base.parameters()).device
        labels, indices = balanced_labels(self.base, self._batch), list(range(self._batch))
        condition, null = conditions(self.base, labels, self._captions, indices)
        sample = torch.randn(self._batch, *self._shape, generator=torch.Generator().manual_seed(0)).to(device)
        timestep = torch.tensor(self.timesteps[0], device=device)
        inputs = (sample, timestep, condition, null, self.config.sampling)
        models = zip(self.names, self._models, strict=True)
        calls = {name: partial(guided, model or self.base, *inputs) for name, model in models}
        return {name: value / self._batch for name, value in median_seconds(calls, _ROUNDS).items()}

    def seconds(self, runs: Mapping[str, Sampled], rounds: int = 3) -> dict[str, float]:
        """Measured seconds per image of whole sampling runs, decoding left out."""

        def call(run: Sampled) -> None:
            with run.attached(self.base):
                sampling = replace(run.sampling, num_images=self._batch)
                generate(self.base, self.scheduler, sampling, shape=self._shape, captions=self._captions)

        measured = median_seconds({name: partial(call, run) for name, run in runs.items()}, rounds)
        return {name: value / self._batch for name, value in measured.items()}

    def identity(self) -> dict[str, Any]:
        """All that decides what a search finds."""
        elsewhere = ("output_dir", "evaluations", "cache", "seeds", "zoo", "storage", "name", "prune")
        values = {name: value for name, value in vars(self.config).items() if name not in elsewhere}
        places = [self.config.model, *(entry.learned or entry.model for entry in self.config.zoo)]
        weights = {name: files_fingerprint(find_model(place)) for name, place in zip(self.names, places, strict=True)}
        costs = dict(zip(self.names, self.space.costs, strict=True))
        return {**values, "zoo": self.names, "weights": weights, "timesteps": self.timesteps, "costs": costs}


def _timesteps(config: ScheduleConfig, scheduler: Any) -> list[float]:
    """The steps to choose among: those that the sampler takes by itself."""
    name, count = config.sampling.scheduler, config.sampling.num_inference_steps
    sampler = make_sampler(name, scheduler)
    if config.drop_steps and not takes_timesteps(sampler):
        raise UserError(
            f"'{name}' takes no timesteps, so that none can be left out: use 'dpmsolver++', 'euler' or 'ddpm', or set "
            f"drop_steps=false."
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
