"""The differences of a base and a patched model."""

import math
import statistics
from collections.abc import Sequence

from stagepatch.evaluation.evaluator import Measured
from stagepatch.evaluation.metrics import metric_names
from stagepatch.report import format_mean


def paired_difference(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of other − base over pairs, and its standard error (NaN for a single pair)."""
    differences = [after - before for before, after in zip(base, other, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))


def comparison_table(
    base: Measured, other: Measured | None, features: str, name: str = "patched"
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each metric as mean ± standard deviation over seeds, and the paired difference ± its
    standard error, also in percent of the base.

    Args:
        features: the extractor's name.
        name: of the other model.
    """
    columns = ["metric", "base"] + ([] if other is None else [name, "difference, paired", "in percent"])
    rows = []
    for key, label in metric_names(features).items():
        if key not in base.metrics[0]:
            continue
        row = [label, _spread(base.values(key))]
        if other is not None:
            mean, error = paired_difference(base.values(key), other.values(key))
            scale = 100.0 / abs(statistics.fmean(base.values(key)) or 1.0)
            difference = f"{mean:+.4f} ± {error:.4f}"
            row += [_spread(other.values(key)), difference, f"{mean * scale:+.1f} ± {error * scale:.1f} %"]
        rows.append(row)
    return columns, rows


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return format_mean(statistics.fmean(values), spread, 4)
