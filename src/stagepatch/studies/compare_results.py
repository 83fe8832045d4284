"""From the jobs' files to rows: means, spreads, and differences to the base that are paired by sampling noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from stagepatch.core import read_json
from stagepatch.studies.compare_jobs import COST_NAME, CompareJob

SIGNIFICANCE = 0.05
_COSTS = ("seconds_per_step", "peak_memory", "file_size")


@dataclass
class Difference:
    """A metric's difference to the base.

    Args:
        mean: over training seeds, each a mean over sampling seeds paired with the base's.
        error: its standard error.
        p_value: of a two-sided t-test that it is zero; NaN where it cannot be made.
    """

    mean: float
    error: float
    p_value: float


@dataclass
class Row:
    """An entry's result.

    Args:
        curve: step -> mean over all seeds, and standard deviation over training seeds (over sampling seeds where
            there is one training seed).
        differences: step -> difference to the base; none for the base itself, or without a base.
        metrics: mean of every metric at the last checkpoint.
    """

    name: str
    method: str
    is_base: bool
    trainable: int
    total: int
    seconds_per_step: float
    peak_memory: float
    file_size: float
    curve: dict[int, tuple[float, float]]
    differences: dict[int, Difference]
    metrics: dict[str, float]

    @property
    def last(self) -> int:
        """The last checkpoint's step."""
        return max(self.curve)


def collect(jobs: Sequence[CompareJob], metric: str) -> list[Row]:
    """A row for each entry, in their order. All jobs are done."""
    by_name: dict[str, list[CompareJob]] = {}
    for job in jobs:
        by_name.setdefault(job.name, []).append(job)
    base = next((job.metrics()[0] for job in jobs if job.is_base), None)
    return [_row(same, base, metric) for same in by_name.values()]


def _row(jobs: list[CompareJob], base: list[dict[str, float]] | None, metric: str) -> Row:
    measured = [job.metrics() for job in jobs]
    is_base = jobs[0].is_base
    trainable, total = jobs[0].trainable_parameters()
    costs = [read_json(job.directory / COST_NAME) for job in jobs if job.config.method != "none"]
    curve, differences = {}, {}
    for step in jobs[0].checkpoints:
        values = [[seed[metric] for seed in each[step]] for each in measured]
        means = [statistics.fmean(each) for each in values]
        curve[step] = (statistics.fmean(means), _deviation(means if len(means) > 1 else values[0]))
        if base is not None and not is_base:
            paired = [[v - b[metric] for v, b in zip(each, base, strict=True)] for each in values]
            differences[step] = difference(paired)
    last = [seed for each in measured for seed in each[max(each)]]
    seconds, memory, size = (statistics.fmean(cost[name] for cost in costs) if costs else 0.0 for name in _COSTS)
    return Row(
        jobs[0].name,
        jobs[0].config.method,
        is_base,
        trainable,
        total,
        seconds,
        memory,
        size,
        curve,
        differences,
        {name: statistics.fmean(seed[name] for seed in last) for name in last[0]},
    )


def difference(paired: list[list[float]]) -> Difference:
    """Of differences by training seed and sampling seed.

    With several training seeds the unit is a training run: a one-sample t-test over the runs' means. With one, it is
    a sampling seed, and the test says nothing of another training run.
    """
    units = [statistics.fmean(each) for each in paired] if len(paired) > 1 else paired[0]
    mean, deviation = statistics.fmean(units), _deviation(units)
    if len(units) < 2:
        return Difference(mean, math.nan, math.nan)
    if deviation == 0.0:
        return Difference(mean, 0.0, 1.0 if mean == 0.0 else 0.0)
    return Difference(mean, deviation / math.sqrt(len(units)), float(stats.ttest_1samp(units, 0.0).pvalue))


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
