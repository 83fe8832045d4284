"""How sure a number is: over seeds or training runs, by Student's t; over the images of one set, by the jackknife.

Of one set of samples the spread is had by leaving out a group of images at a time, and the reference is taken as it
is. A bootstrap is not used: a set that is drawn with replacement has fewer different images, so its Fréchet distance
is higher by as much as that of the set itself is too high, and neighbours at distance 0 (docs/metrics.md has figures).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from stagepatch.evaluation.halves import GROUPS
from stagepatch.evaluation.metrics import Collected, Metric, Split, chosen, taken
from stagepatch.evaluation.statistics import RunningStatistics


@dataclass
class Difference:
    """A metric's difference to another's, or to zero.

    Args:
        mean: over what varies: training seeds, sampling seeds, images.
        error: its standard error.
        p_value: of a two-sided t-test that it is zero; NaN where it cannot be made.
        degrees: of freedom of that test.
    """

    mean: float
    error: float
    p_value: float
    degrees: float = math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95%, by Student's t; NaN where there is none."""
        half = float(stats.t.ppf(0.975, self.degrees)) * self.error if self.degrees > 0 else math.nan
        return self.mean - half, self.mean + half


def of_units(units: Sequence[float]) -> Difference:
    """Of independent units, such as one number a seed."""
    mean = statistics.fmean(units)
    if len(units) < 2:
        return Difference(mean, math.nan, math.nan)
    deviation, degrees = statistics.stdev(units), len(units) - 1
    if deviation == 0.0:
        return Difference(mean, 0.0, 1.0 if mean == 0.0 else 0.0, degrees)
    return Difference(mean, deviation / math.sqrt(len(units)), float(stats.ttest_1samp(units, 0.0).pvalue), degrees)


def difference(paired: Sequence[Sequence[float]]) -> Difference:
    """Of differences by training seed and sampling seed.

    With several training seeds the unit is a training run: a one-sample t-test over the runs' means. With one, it is
    a sampling seed, and the test says nothing of another training run.
    """
    return of_units([statistics.fmean(each) for each in paired] if len(paired) > 1 else paired[0])


def difference_between(one: list[list[float]], other: list[list[float]]) -> Difference:
    """Of two rows' values by training seed and sampling seed.

    Rows of equally many training runs are paired by run, and a row without training is paired with each run; others
    are compared by Welch's test over the runs' means.
    """
    if len(other) == 1:
        other = other * len(one)
    if len(one) == len(other):
        return difference([[a - b for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)])
    means = [[statistics.fmean(run) for run in each] for each in (one, other)]
    test = stats.ttest_ind(*means, equal_var=False)
    mean = statistics.fmean(means[0]) - statistics.fmean(means[1])
    return Difference(mean, abs(mean / float(test.statistic)), float(test.pvalue), float(test.df))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm 1979); what is NaN stays so, and does not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, so_far = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * p))
        corrected[place] = so_far
    return corrected


def groups_of(count: int, groups: int = GROUPS) -> Tensor:
    """Which group each image is in, [count]: in turn, so that each has a share of all classes, however they lie."""
    return torch.arange(count) % min(groups, count)


def left_out(metric: Metric, samples: Tensor, references: Sequence[Collected], groups: Tensor) -> list[float]:
    """A metric without each group of samples, [G]; of all of them the same constant may be missing.

    Args:
        samples: what the metric takes, a row an image.
        groups: of each image, see `groups_of`.

    Raises:
        UserError: features that are no numbers.
    """
    if metric.without is not None:
        return metric.without(samples, *references, groups)
    numbers = range(int(groups.max()) + 1)
    if not metric.moments:
        return [metric.function(samples[groups != number], *references) for number in numbers]

    def part(number: int) -> RunningStatistics:  # made twice, since all of them take more memory than the features
        running = RunningStatistics()
        running.update(samples[groups == number])
        return running

    whole = RunningStatistics()
    for number in numbers:
        whole.merge(part(number))
    return [metric.function(whole.without(part(number)), *references) for number in numbers]


def measure_left_out(
    samples: Mapping[str, Collected],
    reference: Callable[[Split, Metric], Collected | None],
    keys: Iterable[str] | None = None,
    groups: int = GROUPS,
) -> dict[str, list[float]]:
    """`left_out` of metrics by key, of what was collected of samples; the arguments are `measure_collected`'s.

    Metrics of a file of statistics, and FID∞, which is of subsets itself, have none.
    """
    found = {}
    for key, metric in chosen(keys).items():
        given = taken(metric, samples, reference)
        if key != "fid_infinity" and given is not None and isinstance(given[0], Tensor) and len(given[0]) > 1:
            found[key] = left_out(metric, given[0], given[1:], groups_of(len(given[0]), groups))
    return found


def over_images(value: float, without: Sequence[float]) -> Difference:
    """Of a value of one set, by what it is without each group of images (the delete-a-group jackknife).

    The interval is of the value that another set of as many images of the same model would have: what a metric is off
    for any set of this size stays in it. Two sets from the same noise are paired: give the differences of both
    arguments.
    """
    count = len(without)
    error = math.sqrt((count - 1) / count * sum((each - statistics.fmean(without)) ** 2 for each in without))
    p_value = 2.0 * float(stats.t.sf(abs(value) / error, count - 1)) if error else (1.0 if value == 0.0 else 0.0)
    return Difference(value, error, p_value, count - 1)


def compared_over_images(
    one: float, one_without: Sequence[float], other: float, other_without: Sequence[float]
) -> Difference:
    """other − one of two sets, image by image from the same noise; see `over_images`."""
    return over_images(other - one, [b - a for a, b in zip(one_without, other_without, strict=True)])
