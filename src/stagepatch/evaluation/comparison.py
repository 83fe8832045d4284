"""A base and another model side by side, each figure with its 95 % interval."""

import math
import statistics
from collections.abc import Sequence

from stagepatch.evaluation.evaluator import Measured
from stagepatch.evaluation.metrics import metric_names
from stagepatch.evaluation.uncertainty import Difference, compared_over_images, holm, of_units, over_images
from stagepatch.report import format_change, format_interval


def paired_difference(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of other − base over pairs, and its standard error (NaN for a single pair)."""
    found = of_units([after - before for before, after in zip(base, other, strict=True)])
    return found.mean, found.error


def estimate(measured: Measured, key: str) -> Difference:
    """A metric's mean over sampling seeds; of a single seed its value, and how sure it is over the images."""
    values = measured.values(key)
    if len(values) == 1 and key in measured.without:
        return over_images(values[0], measured.without[key])
    return of_units(values)


def change(base: Measured, other: Measured, key: str) -> Difference:
    """other − base of a metric, paired by seed; of a single seed, by image."""
    if len(base.values(key)) == 1 and key in base.without and key in other.without:
        return compared_over_images(base.values(key)[0], base.without[key], other.values(key)[0], other.without[key])
    return of_units([after - before for before, after in zip(base.values(key), other.values(key), strict=True)])


def comparison_table(
    base: Measured, other: Measured | None, features: str, name: str = "patched"
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each metric [95 % interval], and the paired difference [95 % interval], also in percent of the
    base, with the p-value corrected for the number of metrics (Holm). What has no interval is no difference: left out.

    `comparison_note` says what the intervals are over.

    Args:
        features: the extractor's name.
        name: of the other model.
    """
    labels = {key: label for key, label in metric_names(features).items() if key in base.metrics[0]}
    if other is None:
        return ["metric", "base"], [[label, _cell(estimate(base, key))] for key, label in labels.items()]
    changes = {key: change(base, other, key) for key in labels}
    corrected = dict(zip(changes, holm([each.p_value for each in changes.values()]), strict=True))
    columns = ["metric", "base", name, "difference, paired", "in percent", f"p (Holm, {len(changes)} metrics)"]
    rows = []
    for key, label in labels.items():
        found, scale = changes[key], 100.0 / abs(statistics.fmean(base.values(key)) or 1.0)
        row = [label, _cell(estimate(base, key)), _cell(estimate(other, key)), "", "", ""]
        if not math.isnan(found.interval[0]):
            row[3] = format_change(found.mean, found.interval)
            row[4] = format_change(found.mean, found.interval, 1, scale, " %")
            row[5] = f"{corrected[key]:.3f}"
        rows.append(row)
    return columns, rows


def comparison_note(base: Measured, is_compared: bool = True) -> str:
    """What the intervals of a `comparison_table` are over, and what they say nothing of."""
    seeds = len(base.metrics)
    if seeds > 1:
        over, paired = f"{seeds} sampling seeds (Student's t)", "seed"
    elif base.without:
        over, paired = "the images of one sampling seed (20 groups of them)", "image"
    else:
        return "One sampling seed: no interval, and so no difference. Give several seeds."
    note = f"In brackets 95% intervals over {over}; the reference images are taken as they are."
    if not is_compared:
        return note
    return f"{note} Differences are paired by {paired}, from the same noise; of another training run they say nothing."


def _cell(found: Difference) -> str:
    return format_interval(found.mean, found.interval)
