"""From the jobs' files to rows: means, spreads, and differences to the base that are paired by sampling noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagepatch.evaluation import Difference, difference, difference_between, holm
from stagepatch.studies.compare_jobs import CompareJob

SIGNIFICANCE = 0.05
_COSTS = ("seconds_per_step", "peak_memory", "file_size")


@dataclass
class Row:
    """An entry's result.

    Args:
        curve: step -> mean over all seeds, and standard deviation over training seeds (over sampling seeds where
            there is one training seed).
        differences: step -> difference to the base; none for the base itself, or without a base.
        metrics: mean of every metric at the last checkpoint.
        control: why a method must beat it, or empty.
        changes: of every metric, difference to the base at the last checkpoint.
        against: difference of the comparison's metric to each control, by the control's name.
        runs: training runs that it is the mean of.
        is_of_learned: whether what is sampled was learned elsewhere: a guide, a patch, experts, or a model of its own.
        holm: p-value of the difference to the base, corrected for the number of methods (Holm); NaN for what is none.
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
    control: str = ""
    changes: dict[str, Difference] = field(default_factory=dict)
    against: dict[str, Difference] = field(default_factory=dict)
    runs: int = 1
    holm: float = math.nan
    is_of_learned: bool = False

    @property
    def is_method(self) -> bool:
        """Whether something was trained to make it better than the base, and it is no control."""
        return (self.method != "none" or self.is_of_learned) and not self.control

    @property
    def last(self) -> int:
        """The last checkpoint's step."""
        return max(self.curve)


def collect(jobs: Sequence[CompareJob], metric: str) -> list[Row]:
    """A row for each entry, in their order. All jobs are done."""
    by_name: dict[str, list[CompareJob]] = {}
    for job in jobs:
        by_name.setdefault(job.name, []).append(job)
    base_job = next((job for job in jobs if job.is_base), None)
    base = None if base_job is None else base_job.metrics()[0]
    rows = [_row(same, base, metric) for same in by_name.values()]
    for row in rows:
        row.is_of_learned = _is_of_learned(by_name[row.name][0], base_job)
    last = {name: _last(same, metric) for name, same in by_name.items()}
    for row in rows:
        if row.is_method:
            controls = [other.name for other in rows if other.control]
            row.against = {name: difference_between(last[row.name], last[name]) for name in controls}
    methods = [row for row in rows if row.is_method and row.differences]
    corrected = holm([row.differences[row.last].p_value for row in methods])
    for row, p_value in zip(methods, corrected, strict=True):
        row.holm = p_value
    return rows


def _is_of_learned(job: CompareJob, base: CompareJob | None) -> bool:
    has_model = base is not None and job.config.model != base.config.model
    return has_model or any((job.sampling.guide, job.schedule, job.learned))


def _last(jobs: list[CompareJob], metric: str) -> list[list[float]]:
    """A metric at the last checkpoint, by training seed and sampling seed."""
    measured = [job.metrics() for job in jobs]
    return [[seed[metric] for seed in each[max(each)]] for each in measured]


def _row(jobs: list[CompareJob], base: list[dict[str, float]] | None, metric: str) -> Row:
    measured = [job.metrics() for job in jobs]
    is_base = jobs[0].is_base
    trainable, total = jobs[0].trainable_parameters()
    costs = [job.costs() for job in jobs if job.config.method != "none"]
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
        jobs[0].control,
        {} if base is None or is_base else {name: _change(jobs, base, name) for name in last[0]},
        runs=len(jobs),
    )


def _change(jobs: list[CompareJob], base: list[dict[str, float]], metric: str) -> Difference:
    return difference_between(_last(jobs, metric), [[seed[metric] for seed in base]])


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan
