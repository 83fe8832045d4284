"""A search for a model schedule (OMS-DPM, arXiv 2306.08860).

The models that a step may be given to and what a step costs with each, the search, what it found as files, and the
comparison with the base.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import FloatDistribution
from torch import nn

from stagepatch.checkpoints import files_fingerprint, find_model
from stagepatch.core import UserError, as_json, locked, processes, progress_bar, read_json, write_json
from stagepatch.diffusion import make_sampler, set_steps, takes_timesteps
from stagepatch.evaluation import METRICS, Evaluator, comparison_note, comparison_table
from stagepatch.families import sample_shape
from stagepatch.report import write_picture
from stagepatch.sampling import (
    Experts,
    ExpertSource,
    LatentSampling,
    SamplingConfig,
    generate,
    load_expert,
    write_schedule,
)
from stagepatch.sampling.experts import BASE
from stagepatch.sampling.generation import balanced_labels, conditions, guided
from stagepatch.sampling.stand_in import StandIn
from stagepatch.search.config import ScheduleConfig
from stagepatch.search.engine import Evaluation, Point, Report, Search, best_of
from stagepatch.search.model_schedule import NONE, Choices, Space, evolution
from stagepatch.search.objective import SampledMetric, check_alone, run_search
from stagepatch.search.predictor import predicted_evolution
from stagepatch.search.results import PLOT, RESULT, evaluation_json

SCHEDULE = "schedule.yaml"
_BLUE, _GREY = "#1f4e8c", "#9db8d9"
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


class _Answered(StandIn):
    """Gives a model's first output for every later call, so that what else sampling does can be timed."""

    noun = "answers"
    _output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None:
            self._output = self._forward(*args, **kwargs)
        return self._output


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
        self._shape = sample_shape(base) if latents is None else latents.shape
        self._captions = None if latents is None else latents.captions
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
        budget = config.budget_ms / 1000.0 or config.budget * costs[0] * len(self.timesteps)
        self.space = Space(costs, len(self.timesteps), budget, config.drop_steps)

    @property
    def share(self) -> float:
        """The budget, as a share of the base's time at all steps."""
        return self.space.budget / (self.space.costs[0] * self.space.steps)

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
        """Seconds per image of a step with each model: out of a file, or measured and written to it. With a budget in
        milliseconds, what else a step takes is part of them.

        Raises:
            UserError: the file is of other models, or has not what else a step takes.
        """
        with locked(Path(f"{path}.lock")):  # processes that share a search must have the same
            if not path.exists():
                facts = {"device": str(processes().device), "batch_size": self._batch}
                write_json(path, {**facts, "seconds": self._step(), "besides": self._besides()})
            content = read_json(path)
        seconds, more = content.get("seconds"), content.get("besides") if self.config.budget_ms else 0.0
        if not isinstance(seconds, dict) or list(seconds) != self.names:
            raise UserError(f"'{path}' has not the costs of {', '.join(self.names)}: delete it to measure them.")
        if more is None:
            raise UserError(f"'{path}' has not what sampling takes besides the models: delete it to measure that too.")
        return tuple(float(value) + float(more) for value in seconds.values())

    def _step(self) -> dict[str, float]:
        """Seconds per image of a step such as sampling's first batch makes, guidance included, with each model."""
        device: Any = next(self.base.parameters()).device
        labels, indices = balanced_labels(self.base, self._batch), list(range(self._batch))
        batch_conditions = conditions(self.base, labels, self._captions, indices)
        sample = torch.randn(self._batch, *self._shape, generator=torch.Generator().manual_seed(0)).to(device)
        timestep = torch.tensor(self.timesteps[0], device=device)
        inputs = (sample, timestep, batch_conditions, self.config.sampling)
        models = zip(self.names, self._models, strict=True)
        calls = {name: partial(guided, model or self.base, *inputs) for name, model in models}
        return {name: value / self._batch for name, value in median_seconds(calls, _ROUNDS).items()}

    def _besides(self) -> float:
        """Seconds per image and step of all that sampling does besides the models: the sampler's own arithmetic, the
        noise, and the loop."""
        with _Answered(self.base):
            (seconds,) = self.seconds({"": Sampled(self.config.sampling, None, 0.0)}, _ROUNDS).values()
        return seconds / len(self.timesteps)

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
    sampler = make_sampler(name, scheduler, config.sampling.timestep_spacing)
    if config.drop_steps and not takes_timesteps(sampler):
        raise UserError(
            f"'{name}' takes no timesteps, so that none can be left out: use 'dpmsolver++', 'euler' or 'ddpm', or set "
            f"drop_steps=false."
        )
    set_steps(sampler, count, name)
    timesteps = [round(float(timestep), 4) for timestep in sampler.timesteps]
    if len(timesteps) != count or sorted(set(timesteps), reverse=True) != timesteps:
        raise UserError(
            f"'{name}' calls the model otherwise than once at each of {count} falling timesteps: use another."
        )
    return [int(timestep) if timestep.is_integer() else timestep for timestep in timesteps]


def check_config(config: ScheduleConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UserError: by name of the setting; or this process is one of a launch.
    """
    check_alone("schedule")
    if not config.budget > 0.0:
        raise UserError(f"budget={config.budget} must be above 0: a share of the base model's time at all steps.")
    if config.predictor not in ("ridge", "lstm"):
        raise UserError(f"predictor='{config.predictor}' is none of ridge, lstm.")
    if config.predictor == "lstm" and not 0 < config.random_evaluations < config.evaluations:
        raise UserError(
            f"random_evaluations={config.random_evaluations} must be at least 1 and below evaluations="
            f"{config.evaluations}: the LSTM learns of these, and proposes the rest."
        )
    if not config.seeds or config.sampling.seed in config.seeds:
        raise UserError(
            f"seeds={config.seeds} must be some, and without {config.sampling.seed}, the search's own seed "
            f"(sampling.seed): a schedule looks better than it is on the noise that it was chosen by."
        )


def choices_of(point: Point) -> Choices:
    """The model schedule that a point of the search is."""
    return tuple(map(int, point))


def search_model_schedule(zoo: Zoo, evaluator: Evaluator) -> list[Evaluation]:
    """Sample and measure model schedules, those of a former start left out.

    Raises:
        UserError: a storage of another search.
    """
    config = zoo.config
    # What a schedule is chosen by must not be what it is judged by.
    metric = SampledMetric(evaluator.without_held_out(), config.metric)

    def objective(point: Point, report: Report | None) -> float:
        run = zoo.with_schedule(choices_of(point))
        with run.attached(zoo.base):
            return metric(zoo.base, zoo.scheduler, run.sampling, report)

    space = [FloatDistribution(NONE, len(zoo.names) - 1, step=1)] * len(zoo.timesteps)
    search = Search(config, Path(config.output_dir), space, objective, zoo.identity())
    count, seed = config.evaluations, config.sampling.seed
    strategy = evolution(zoo.space, count, seed)
    if config.predictor == "lstm":
        strategy = predicted_evolution(zoo.space, zoo.timesteps, count, config.random_evaluations, seed)
    (found,) = run_search(search, [strategy], metric).values()
    return found


def write_results(zoo: Zoo, evaluations: list[Evaluation]) -> None:
    """schedule.yaml: the best; search.json: all evaluations in order; search.png: how it was found."""
    config, directory = zoo.config, Path(zoo.config.output_dir)
    sign, best = METRICS[config.metric].sign, best_of(evaluations)
    steps = zoo.steps(choices_of(best.point))
    comment = (
        f"Found by stagepatch schedule for '{config.model}', within {zoo.share:.4g} of its time at "
        f"{zoo.space.steps} steps: {config.metric} {sign * best.value:.4g} in the search."
    )
    write_schedule(directory / SCHEDULE, zoo.sources, steps, config.sampling.scheduler, comment)
    names = [*zoo.names, None]  # the last is that of NONE
    found = []
    for each in evaluations:
        choices = choices_of(each.point)
        found.append(
            evaluation_json(each, zoo.space.seconds(choices), sign, schedule=[names[choice] for choice in choices])
        )
    write_json(directory / RESULT, {"settings": as_json(zoo.identity()), "evaluations": found})
    write_picture(directory / PLOT, search_picture(zoo, evaluations))


def search_picture(zoo: Zoo, evaluations: list[Evaluation]) -> Figure:
    """Above, the evaluations and the best so far; below, which model the best schedule has at each timestep."""
    figure = Figure(figsize=(7.0, 4.0 + 0.35 * len(zoo.names)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.0, 0.6 + 0.4 * len(zoo.names)])
    metric, numbers = METRICS[zoo.config.metric], range(1, len(evaluations) + 1)
    values = [metric.sign * each.value for each in evaluations]
    best = itertools.accumulate(values, min if metric.better == "lower" else max)
    above.plot(numbers, values, "o", markersize=3, color=_GREY, label="a schedule")
    above.step(numbers, list(best), where="post", color=_BLUE, label="best so far")
    for value, each in zip(values, evaluations, strict=True):
        if choices_of(each.point) == zoo.space.evenly(0):
            above.axhline(value, color="black", linewidth=0.8, linestyle="--", label="base, evenly spaced steps")
    scale = "log" if all(value > 0.0 for value in values) else "linear"
    above.set(xlabel="evaluations", ylabel=zoo.config.metric, yscale=scale)
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.grid(alpha=0.25, which="both")
    above.legend(fontsize=8)
    chosen = choices_of(best_of(evaluations).point)
    for choice, timestep in zip(chosen, zoo.timesteps, strict=True):
        marker, size, colour = ("x", 4, "grey") if choice == NONE else ("s", 6, _BLUE)
        below.plot(timestep, choice, marker, markersize=size, color=colour)
    lowest = NONE if NONE in chosen else 0
    below.set_yticks(range(lowest, len(zoo.names)), ["left out", *zoo.names][lowest + 1 :])
    below.set(ylim=(lowest - 0.5, len(zoo.names) - 0.5), xlabel="timestep, from noise to image")
    below.invert_xaxis()
    below.grid(alpha=0.25)
    return figure


def compare_with_base(zoo: Zoo, evaluator: Evaluator, best: Choices) -> tuple[list[str], list[list[str]], str]:
    """The base and a model schedule, on seeds that the search did not see; metrics.json keeps all.

    The base at all steps, at so many as the budget has room for, and, as much of what a search gains may lie in the
    steps that it had to choose among, at so many of these, evenly spaced.

    Returns:
        A table: columns, rows and title.
    """
    config, steps, evenly = zoo.config, zoo.space.steps, zoo.space.evenly(0)
    count = min(steps, max(1, int(zoo.share * steps + 1e-9)))
    runs = {f"base, {each} steps": zoo.alone(each) for each in dict.fromkeys((steps, count))}
    if config.drop_steps and 0 in evenly and count < steps:
        runs[f"base, {count} of the {steps}"] = zoo.with_schedule(evenly)
    runs[f"schedule, {sum(choice != NONE for choice in best)} steps"] = zoo.with_schedule(best)
    measured = {}
    with progress_bar() as progress:
        total = len(runs) * len(config.seeds) * config.sampling.num_images
        task = progress.add_task("comparing", total=total, status="")
        advance = partial(progress.advance, task)
        for name, run in runs.items():
            with run.attached(zoo.base):
                measured[name] = evaluator.measure(zoo.base, zoo.scheduler, run.sampling, config.seeds, advance)
    seconds = zoo.seconds(runs)
    metrics = {name: result.metrics for name, result in measured.items()}
    found = {"seeds": config.seeds, **metrics, "seconds per image": seconds}
    write_json(Path(config.output_dir) / "metrics.json", found)
    features = evaluator.extractor.name
    *others, base, schedule = measured
    _, rows = comparison_table(measured[base], measured[schedule], features)
    rows = [row[:4] for row in rows]  # not in percent too
    for other in reversed(others):
        _, spreads = comparison_table(measured[other], None, features)
        rows = [[label, spread, *rest] for (label, *rest), (_, spread) in zip(rows, spreads, strict=True)]
    rows.append(["s per image, of the costs", *(f"{run.seconds:.3g}" for run in runs.values()), ""])
    rows.append(["s per image, measured", *(f"{value:.3g}" for value in seconds.values()), ""])
    title = (
        f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds that the search did not see; the "
        f"difference is to '{base}'. {comparison_note(measured[base])}"
    )
    return ["metric", *measured, "difference, paired"], rows, title
