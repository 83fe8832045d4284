"""A comparison as Markdown, CSV, JSON and one page."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from stagepatch import report
from stagepatch.core import read_tensors, write_text
from stagepatch.evaluation import METRICS, Difference, direction_note, metric_names
from stagepatch.sampling import SamplingConfig
from stagepatch.studies.compare_config import ITSELF
from stagepatch.studies.compare_jobs import SAMPLES_NAME, CompareJob
from stagepatch.studies.compare_results import SIGNIFICANCE, Row
from stagepatch.studies.verdict import verdict

_CONTROLS_NOTE = (
    "In percent of the base, in brackets 95% intervals: the method's value less the control's, the best control "
    "first; paired by training run where both have as many, by Welch's test elsewhere. Intervals and p-values are of "
    "one difference each."
)
_COLUMNS_NOTE = (
    "Trained: number of parameters that learn, and their share of the model's. s/step: seconds of a training step, "
    "median. Peak MiB: memory of the job's process, on a GPU of its allocator."
)
_CURVES_CAPTION = (
    "The metric over iterations beyond the base's own; the dashed line is the base. Bars: standard deviation over "
    "training seeds."
)
_GAIN_CAPTION = (
    "Difference to the base at the last checkpoint, against the number of trained parameters and against the time of "
    "a training step [s]. Bars: 95% interval."
)
COLUMNS = ["method", "trained", "share", "s/step", "peak MiB", "file MiB"]
JUDGED = ["difference to base", "in percent", "p", "p (Holm)"]


def table(rows: Sequence[Row], metric: str, features: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of text, one column for each checkpoint."""
    steps = sorted({step for row in rows for step in row.curve if step})
    label = metric_names(features)[metric]
    columns = [*COLUMNS, *([f"{label} at {step}" for step in steps] or [label]), *JUDGED]
    return columns, [_cells(row, rows, steps) for row in rows]


def _cells(row: Row, rows: Sequence[Row], steps: list[int]) -> list[str]:
    cells = [row.name, f"{row.trainable:,}", f"{100 * row.trainable / row.total:.2f}%"]
    if row.method == "none":
        cells += ["", "", ""]
    else:
        cells += [f"{row.seconds_per_step:.3f}", f"{row.peak_memory / 2**20:.0f}", f"{row.file_size / 2**20:.2f}"]
    if row.is_base:
        value = report.format_mean(*row.curve[0], 4)
        return [*cells, *([value] * len(steps) or [value]), *[""] * len(JUDGED)]
    cells += [report.format_mean(*row.curve[step], 4) if step in row.curve else "" for step in steps]
    change = row.differences.get(row.last)
    if change is None:
        return [*cells, *[""] * len(JUDGED)]
    base = next(other.curve[0][0] for other in rows if other.is_base)
    sign = " *" if change.p_value < SIGNIFICANCE else ""
    p_value = "" if math.isnan(change.p_value) else f"{change.p_value:.3f}"
    percent = _points(change, base)
    corrected = "" if math.isnan(row.holm) else f"{row.holm:.3f}"
    return [*cells, report.format_change(change.mean, change.interval) + sign, percent, p_value, corrected]


def against_controls(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Difference of every method to every control, the best first, in percent of the base, with its p-value."""
    base = next((row.curve[0][0] for row in rows if row.is_base), math.nan)
    controls = [row for row in rows if row.control]
    controls.sort(key=lambda row: METRICS[metric].sign * row.metrics[metric])
    columns = ["method", *(f"{row.name} ({row.control})" for row in controls)]
    cells = [[row.name, *(_tested(row.against[c.name], base) for c in controls)] for row in rows if row.against]
    return columns, cells


def changes(rows: Sequence[Row], features: str) -> tuple[list[str], list[list[str]]]:
    """Every metric's difference to the base, with its 95% interval."""
    keys = list(rows[0].metrics)
    of_rows = [(row.name, [row.changes[key] for key in keys]) for row in rows if row.changes]
    cells = [[name, *(report.format_change(each.mean, each.interval) for each in found)] for name, found in of_rows]
    names = metric_names(features)
    return ["method", *(names[key] for key in keys)], cells


def _points(change: Difference, base: float) -> str:
    return report.format_change(change.mean, change.interval, 1, 100.0 / abs(base), " %")


def _tested(change: Difference, base: float) -> str:
    return _points(change, base) + ("" if math.isnan(change.p_value) else f" (p {change.p_value:.3f})")


def short(columns: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """What fits on a terminal: method, share trained, and the last checkpoint, of each entry its own."""
    measured = slice(len(COLUMNS), -len(JUDGED))
    last = [next((cell for cell in reversed(row[measured]) if cell), "") for row in cells]
    is_one = all(row[measured][-1] for row in cells)
    label = columns[measured][-1] if is_one else columns[measured][-1].rpartition(" at ")[0] + " at the end"
    return (
        [columns[0], columns[2], label, *JUDGED],
        [[row[0], row[2], value, *row[-len(JUDGED) :]] for row, value in zip(cells, last, strict=True)],
    )


def note(jobs: Sequence[CompareJob], metric: str) -> str:
    """How the table is to be read."""
    seeds = max(Counter(job.name for job in jobs).values())
    sampling = next((job for job in jobs if job.is_base), jobs[0]).sampling
    others = {job.name: job.sampling for job in jobs if job.sampling != sampling}
    named = "; ".join(f"{name} ({_sampler(own)})" for name, own in others.items())
    otherwise = f" Sampled otherwise: {named}." if others else ""
    unit = (
        "training run (of what is not trained, a sampling seed)" if seeds > 1 else "sampling seed, of one training run"
    )
    return (
        f"Mean ± standard deviation over {seeds} training seed(s), each the mean of {len(jobs[0].sampling_seeds)} "
        f"sampling seeds of {sampling.num_images} images ({_sampler(sampling)}), the same noise for all."
        f"{otherwise} Differences are paired by sampling seed, in brackets 95% intervals; "
        f"* marks p < {SIGNIFICANCE} of a two-sided t-test. The unit of both is a {unit}; of a single one there is no "
        f"interval, and so no difference. p (Holm) is corrected for the number of methods. {direction_note([metric])}"
    )


def _sampler(sampling: SamplingConfig) -> str:
    guidance = f", guidance {sampling.guidance_scale:g}" if sampling.guidance_scale != 1.0 else ""
    guide = "what it learned" if sampling.guide == ITSELF else f"'{sampling.guide}'"
    guidance += f", guided by {guide}, {sampling.guide_scale:g}" if sampling.guide else ""
    if guidance and sampling.guidance_interval != [0.0, 1.0]:
        guidance += " from {:g} to {:g}".format(*sampling.guidance_interval)
    spacing = f" ({sampling.timestep_spacing})" if sampling.timestep_spacing else ""
    return f"{sampling.num_inference_steps} steps of {sampling.scheduler}{spacing}{guidance}"


def write_results(
    directory: Path, jobs: Sequence[CompareJob], rows: Sequence[Row], metric: str, resolved: str
) -> None:
    """table.md, table.csv, results.json and report.html."""
    features = jobs[0].extractor + " features"
    columns, cells = table(rows, metric, features)
    parts = [report.markdown_table(columns, cells), note(jobs, metric), verdict(rows, metric)]
    controls, found = against_controls(rows, metric), changes(rows, features)
    parts += [report.markdown_table(*each) for each in (controls, found) if each[1]]
    write_text(directory / "table.md", "\n\n".join(part.strip() for part in parts) + "\n")
    sheet = io.StringIO()
    csv.writer(sheet).writerows([columns, *cells])
    write_text(directory / "table.csv", sheet.getvalue())
    write_text(directory / "results.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    names = {key: label for key, label in metric_names(features).items() if key in rows[0].metrics}
    header, direction = ["method", *names.values()], direction_note([metric])
    values = [[row.name, *(f"{row.metrics[key]:.4f}" for key in names)] for row in rows]
    sections: list[report.Section] = [
        report.Prose("Verdict", verdict(rows, metric)),
        report.Table("All methods", columns, cells, f"{_COLUMNS_NOTE} {note(jobs, metric)}"),
        *([report.Table("Against the controls", *controls, _CONTROLS_NOTE)] if controls[1] else []),
        report.Picture("Over iterations", curves(rows, metric, features), _CURVES_CAPTION),
        report.Picture("Gain against cost", gain_against_cost(rows, metric, features), f"{_GAIN_CAPTION} {direction}"),
        report.Table("All metrics at the last checkpoint", header, values, direction_note(rows[0].metrics)),
        *([report.Table("Differences to the base", *found, "In brackets 95% intervals.")] if found[1] else []),
        *_samples(jobs),
        *report.provenance(resolved, "stagepatch compare --config run.yaml\n"),
    ]
    lead = f"{len(rows)} methods on '{jobs[0].config.model}', trained on the same batches, noise and timesteps."
    report.write_page(directory / "report.html", "stagepatch compare", lead, sections)


def _samples(jobs: Sequence[CompareJob]) -> list[report.Section]:
    """Of each method, over the base's; alone where there is no base, or one of another size."""
    first = {job.name: job for job in reversed(jobs)}
    base = next((job.name for job in jobs if job.is_base), "")
    images = {
        name: read_tensors(first[name].directory / SAMPLES_NAME)[0]["images"]
        for name in dict.fromkeys(job.name for job in jobs)
    }
    sections: list[report.Section] = []
    for name, own in images.items():
        title = f"Samples: {name}"
        if base and own.shape[1:] == images[base].shape[1:]:
            if name != base:
                caption = f"Equal places are from the same noise: '{base}' left of the slider, '{name}' right of it."
                sections.append(report.Comparison.of_samples(title, images[base], own, (base, name), caption))
        else:
            sections.append(report.Picture(title, report.image_grid(own[:40]), "From the same noise in every grid."))
    return sections


def curves(rows: Sequence[Row], metric: str, features: str) -> Figure:
    """The metric over iterations, a line an entry from the base's value on (as in Fig. 1 of arXiv 2405.17825)."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    base = next((row.curve[0] for row in rows if row.is_base), None)
    for row in rows:
        if row.is_base:
            axes.axhline(row.curve[0][0], color="black", linewidth=0.8, linestyle="--", label=row.name)
            continue
        points = ([(0, base[0], 0.0)] if base else []) + [(step, *row.curve[step]) for step in sorted(row.curve)]
        steps, means, spreads = zip(*points, strict=True)
        axes.errorbar(
            steps, means, [0.0 if math.isnan(s) else s for s in spreads], marker="o", markersize=3, label=row.name
        )
    axes.set_xlabel("further iterations")
    axes.set_ylabel(metric_names(features)[metric])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    return figure


def gain_against_cost(rows: Sequence[Row], metric: str, features: str) -> Figure:
    """Difference to the base against trained parameters and against time a step."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    trained = [row for row in rows if row.differences and row.method != "none"]
    costs = {"trained parameters": "trainable", "seconds a step": "seconds_per_step"}
    for place, (label, attribute) in enumerate(costs.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        for row in trained:
            change, cost = row.differences[row.last], getattr(row, attribute)
            half = change.interval[1] - change.mean
            axes.errorbar(cost, change.mean, 0.0 if math.isnan(half) else half, marker="o")
            axes.annotate(row.name, (cost, change.mean), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axes.axhline(0.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.set_ylabel(f"difference to the base,\n{metric_names(features)[metric]}")
        if place == 0 and trained:
            axes.set_xscale("log")
        axes.grid(alpha=0.25)
    return figure
