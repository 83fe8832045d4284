"""A search for a model schedule, what it found as files, and the comparison with the base."""

import itertools
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stagepatch.core import settings
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_json
from stagepatch.core.progress import progress_bar
from stagepatch.evaluation import METRICS, Evaluator, comparison_table
from stagepatch.sampling import write_schedule
from stagepatch.search.config import ScheduleConfig
from stagepatch.search.engine import Box, Evaluation, Point, Report, best_of
from stagepatch.search.model_schedule import NONE, Choices, evolution
from stagepatch.search.objective import SampledMetric, run_search
from stagepatch.search.results import PLOT, RESULT, as_json, write_figure
from stagepatch.search.zoo import Zoo

SCHEDULE = "schedule.yaml"
_BLUE, _GREY = "#1f4e8c", "#9db8d9"


def check_config(config: ScheduleConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UserError: by name of the setting.
    """
    if not config.budget > 0.0:
        raise UserError(f"budget={config.budget} must be above 0: a share of the base model's time at all steps.")
    if config.evaluations < 1:
        raise UserError(f"evaluations={config.evaluations} must be at least 1.")
    if not config.seeds or config.sampling.seed in config.seeds:
        raise UserError(
            f"seeds={config.seeds} must be some, and without {config.sampling.seed}, the search's own seed "
            f"(sampling.seed): a schedule looks better than it is on the noise that it was chosen by."
        )


def choices_of(point: Point) -> Choices:
    """The model schedule that a point of the search's box is."""
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

    box = Box(len(zoo.timesteps), NONE, len(zoo.names) - 1, step=1)
    strategy = evolution(zoo.space, config.evaluations, config.sampling.seed)
    found = run_search(config, Path(config.output_dir), box, objective, metric, zoo.identity(), [strategy])
    return found[strategy.name]


def write_results(zoo: Zoo, evaluations: list[Evaluation]) -> None:
    """schedule.yaml: the best; search.json: all evaluations in order; search.png: how it was found."""
    config, directory = zoo.config, Path(zoo.config.output_dir)
    sign, best = METRICS[config.metric].sign, best_of(evaluations)
    steps = zoo.steps(choices_of(best.point))
    comment = (
        f"Found by stagepatch schedule for '{config.model}', within {config.budget:g} of its time at "
        f"{zoo.space.steps} steps: {config.metric} {sign * best.value:.4g} in the search."
    )
    write_schedule(directory / SCHEDULE, zoo.sources, steps, config.sampling.scheduler, comment)
    names = [*zoo.names, None]  # the last is that of NONE
    found = []
    for each in evaluations:
        choices = choices_of(each.point)
        found.append(as_json(each, zoo.space.seconds(choices), sign, schedule=[names[choice] for choice in choices]))
    write_json(directory / RESULT, {"settings": settings.as_json(zoo.identity()), "evaluations": found})
    write_figure(directory / PLOT, search_picture(zoo, evaluations))


def search_picture(zoo: Zoo, evaluations: list[Evaluation]) -> Figure:
    """Above, the evaluations and the best so far; below, which model the best schedule has at each timestep."""
    figure = Figure(figsize=(7.0, 4.0 + 0.35 * len(zoo.names)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.0, 0.6 + 0.4 * len(zoo.names)])
    metric, numbers = METRICS[zoo.config.metric], range(1, len(evaluations) + 1)
    values = [metric.sign * each.value for each in evaluations]
    best = itertools.accumulate(values, min if metric.better == "lower" else max)
    above.plot(numbers, values, linestyle="", marker="o", markersize=3, color=_GREY, label="a schedule")
    above.step(numbers, list(best), where="post", color=_BLUE, label="best so far")
    for value, each in zip(values, evaluations, strict=True):
        if choices_of(each.point) == zoo.space.evenly(0):
            above.axhline(value, color="black", linewidth=0.8, linestyle="--", label="base, evenly spaced steps")
    above.set_xlabel("evaluations")
    above.set_ylabel(zoo.config.metric)
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(value > 0.0 for value in values):
        above.set_yscale("log")
    above.grid(alpha=0.25, which="both")
    above.legend(fontsize=8)
    chosen = choices_of(best_of(evaluations).point)
    is_dropped = NONE in chosen
    for choice, timestep in zip(chosen, zoo.timesteps, strict=True):
        style = (
            {"marker": "x", "markersize": 4, "color": "grey"} if choice == NONE else {"marker": "s", "color": _BLUE}
        )
        below.plot([timestep], [choice], linestyle="", **style)
    below.set_yticks(range(-1 if is_dropped else 0, len(zoo.names)), [*["left out"] * is_dropped, *zoo.names])
    below.set_ylim((-1.5 if is_dropped else -0.5), len(zoo.names) - 0.5)
    below.invert_xaxis()
    below.set_xlabel("timestep, from noise to image")
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
    count = min(steps, max(1, int(config.budget * steps + 1e-9)))
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
    rows = [
        row[:-1] for row in comparison_table(measured[base], measured[schedule], features)[1]
    ]  # not in percent too
    for other in reversed(others):
        spreads = comparison_table(measured[other], None, features)[1]
        rows = [[label, spread, *rest] for (label, *rest), (_, spread) in zip(rows, spreads, strict=True)]
    rows.append(["s per image, of the costs", *(f"{run.seconds:.3g}" for run in runs.values()), ""])
    rows.append(["s per image, measured", *(f"{value:.3g}" for value in seconds.values()), ""])
    title = (
        f"{config.sampling.num_images} images a seed, {len(config.seeds)} seeds that the search did not see; the "
        f"difference is to '{base}'"
    )
    return ["metric", *measured, "difference, paired"], rows, title
