"""Search for a schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, load_on_device
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_atomically, write_json, write_text
from stagepatch.core.processes import processes
from stagepatch.core.progress import progress_bar
from stagepatch.evaluation import (
    Measured,
    References,
    comparison_table,
    latent_sampling,
    load_extractor,
    load_references,
    measure,
)
from stagepatch.report import print_table
from stagepatch.sampling import Experts, SamplingConfig, write_schedule
from stagepatch.search import NONE, Choices, Journal, Space, Zoo, load_zoo, search, search_picture

_HIGH = ("precision", "recall")
# (sampling, seeds, references, called with images done) -> metrics
_Measure = Callable[[SamplingConfig, list[int], References, Callable[[int], None]], Measured]


def schedule(config: configs.ScheduleConfig, resolved: str) -> None:
    """Search for the best schedule within the budget, and compare it with the base on other seeds."""
    _check(config)
    directory = Path(config.output_dir)
    zoo = _load(config)
    references, extractor = load_references(config.data), load_extractor(config.extractor)
    journal = Journal(directory / "search.json", zoo.settings(config), zoo.names)
    costs = zoo.costs(directory / "costs.json")
    space = zoo.space(config, costs)
    write_text(directory / RUN_CONFIG, resolved)
    print(
        f"Budget: {space.budget:.3g} s per image, {config.budget:.0%} of the base model's {space.steps} steps. A step "
        f"takes {', '.join(f'{cost:.3g} s with {name}' for name, cost in zip(zoo.names, costs, strict=True))}."
    )

    def measured(
        sampling: SamplingConfig, seeds: list[int], against: References, on_batch: Callable[[int], None]
    ) -> Measured:
        return measure(zoo.base, zoo.scheduler, sampling, seeds, against, extractor, on_batch, zoo.latents)

    best = _search(config, zoo, space, journal, measured, references)
    _write(directory, config, zoo, space, journal, best)
    _compare(directory, config, zoo, space, best, measured, references, extractor.name)
    print(f"The schedule is in '{directory / 'schedule.yaml'}': stagepatch sample --schedule takes it.")


def _check(config: configs.ScheduleConfig) -> None:
    """Refuse what can be refused before anything is loaded."""
    if processes().num_processes > 1:
        raise UserError("A search for a schedule runs in one process: start it without accelerate launch.")
    if not config.budget > 0.0:
        raise UserError(f"budget={config.budget} must be above 0: a share of the base model's time at all steps.")
    if config.evaluations < 1:
        raise UserError(f"evaluations={config.evaluations} must be at least 1.")
    if not config.seeds or config.sampling.seed in config.seeds:
        raise UserError(
            f"seeds={config.seeds} must be some, and without {config.sampling.seed}, the search's own seed "
            f"(sampling.seed): a schedule looks better than it is on the noise that it was chosen by."
        )


def _load(config: configs.ScheduleConfig) -> Zoo:
    latents = latent_sampling(config.model, config.data, Path(config.cache or Path(config.output_dir) / "cache"))
    model, scheduler = load_on_device(config.model)
    return load_zoo(config, model, scheduler, latents)


def _search(
    config: configs.ScheduleConfig,
    zoo: Zoo,
    space: Space,
    journal: Journal,
    measured: _Measure,
    references: References,
) -> Choices:
    """Sample and measure schedules, those of a former start left out."""
    sign = -1.0 if config.metric in _HIGH else 1.0
    train = replace(references, held_out=None)  # what a schedule is chosen by must not be what it is judged by
    with progress_bar() as progress:
        known = {
            choices: sign * value for choices, value in journal.known.items() if space.holds(space.seconds(choices))
        }
        evaluations = progress.add_task("evaluations", total=config.evaluations, completed=len(known), status="")
        images = progress.add_task("sampling", total=config.sampling.num_images, status="")

        def evaluate(choices: Choices) -> float:
            progress.reset(images)
            experts = zoo.experts(choices)
            with experts.attach(zoo.base):
                result = measured(
                    experts.sampling(config.sampling),
                    [config.sampling.seed],
                    train,
                    lambda count: progress.advance(images, count),
                )
            value = result.values(config.metric)[0]
            journal.add(choices, value, space.seconds(choices))
            best = sign * min(sign * each for each in journal.known.values())
            progress.update(evaluations, advance=1, status=f"best {config.metric} {best:.4g}")
            return sign * value

        return search(space, evaluate, config.evaluations, config.sampling.seed, known)


def _write(
    directory: Path, config: configs.ScheduleConfig, zoo: Zoo, space: Space, journal: Journal, best: Choices
) -> None:
    """The schedule, and the picture of how it was found."""
    steps = [(timestep, choice) for timestep, choice in zip(zoo.timesteps, best, strict=True) if choice != NONE]
    comment = (
        f"Found by stagepatch schedule for '{config.model}', within {config.budget:g} of its time at {space.steps} "
        f"steps: {config.metric} {journal.known[best]:.4g} in the search."
    )
    write_schedule(directory / "schedule.yaml", zoo.sources, steps, config.sampling.scheduler, comment)
    figure = search_picture(
        list(journal.known.values()),
        journal.known.get(space.evenly(0)),
        config.metric,
        config.metric not in _HIGH,
        zoo.timesteps,
        zoo.names,
        best,
    )
    write_atomically(directory / "search.png", lambda path: figure.savefig(path, format="png", dpi=130))


def _compare(
    directory: Path,
    config: configs.ScheduleConfig,
    zoo: Zoo,
    space: Space,
    best: Choices,
    measured: _Measure,
    references: References,
    features: str,
) -> None:
    """The base and the schedule, on seeds that the search did not see.

    The base at all steps, at so many as the budget has room for, and, as much of what a search gains may lie in the
    steps that it had to choose among, at so many of these, evenly spaced.
    """
    count = min(space.steps, max(1, int(config.budget * space.steps + 1e-9)))
    runs: dict[str, tuple[SamplingConfig, Experts | None]] = {f"base, {space.steps} steps": (config.sampling, None)}
    if count < space.steps:
        runs[f"base, {count} steps"] = (replace(config.sampling, num_inference_steps=count), None)
    predicted = [space.costs[0] * sampling.num_inference_steps for sampling, _ in runs.values()]
    chosen = {f"schedule, {sum(choice != NONE for choice in best)} steps": best}
    if config.drop_steps and 0 in space.evenly(0) and count < space.steps:
        chosen = {f"base, {count} of the {space.steps}": space.evenly(0), **chosen}
    for name, choices in chosen.items():
        experts = zoo.experts(choices)
        runs[name] = (experts.sampling(config.sampling), experts)
        predicted.append(space.seconds(choices))
    results = {}
    with progress_bar() as progress:
        total = len(runs) * len(config.seeds) * config.sampling.num_images
        task = progress.add_task("comparing", total=total, status="")
        for name, (sampling, on) in runs.items():
            with nullcontext() if on is None else on.attach(zoo.base):
                results[name] = measured(sampling, config.seeds, references, lambda done: progress.advance(task, done))
    seconds = zoo.seconds(runs)
    metrics = {name: result.metrics for name, result in results.items()}
    write_json(directory / "metrics.json", {"seeds": config.seeds, **metrics, "seconds per image": seconds})
    *others, base, name = results
    rows = [row[:-1] for row in comparison_table(results[base], results[name], features)[1]]  # not in percent too
    for other in reversed(others):
        spreads = comparison_table(results[other], None, features)[1]
        rows = [[label, spread, *rest] for (label, *rest), (_, spread) in zip(rows, spreads, strict=True)]
    rows.append(["s per image, of the costs", *(f"{value:.3g}" for value in predicted), ""])
    rows.append(["s per image, measured", *(f"{seconds[name]:.3g}" for name in results), ""])
    title = (
        f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds that the search did not see; the "
        f"difference is to '{base}'"
    )
    print_table(["metric", *results, "difference, paired"], rows, title)
