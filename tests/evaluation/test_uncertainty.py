"""Intervals: that they are those of SciPy, and that they hold as often as they say."""

import math
import statistics

import pytest
import torch
from scipy import stats

from stagepatch.evaluation import METRICS, Statistics, compared_over_images, fid, of_units, over_images
from stagepatch.evaluation.uncertainty import groups_of, left_out

SIZE = 4
OTHER = Statistics(0, torch.zeros(SIZE).double(), torch.eye(SIZE).double())
FID = METRICS["fid_train"]


def test_units_are_judged_by_students_t():
    values = [2.0, 3.0, 4.5, 3.9]
    found, expected = of_units(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert (found.p_value, found.degrees) == (pytest.approx(expected.pvalue), 3)
    assert all(math.isnan(end) for end in of_units([1.0]).interval)
    assert of_units([1.0, 1.0]).interval == (1.0, 1.0)


def test_the_jackknife_of_a_mean_is_the_means_own_standard_error():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    without = [float(values[torch.arange(40) != place].mean()) for place in range(40)]
    found = over_images(float(values.mean()), without)
    assert found.error == pytest.approx(float(values.std() / math.sqrt(40)))
    assert found.p_value == pytest.approx(stats.ttest_1samp(values.numpy(), 0).pvalue)
    assert over_images(1.0, [1.0, 1.0]).interval == (1.0, 1.0)


def test_groups_have_all_classes_of_sorted_images():
    labels = torch.arange(10).repeat_interleave(40)
    for group in range(20):
        assert torch.bincount(labels[groups_of(400) == group], minlength=10).tolist() == [2] * 10
    assert groups_of(5).tolist() == [0, 1, 2, 3, 4]


def test_without_a_group_a_frechet_distance_is_that_of_the_others():
    drawn = torch.randn(70, SIZE, generator=torch.Generator().manual_seed(0))
    groups = groups_of(70, 7)
    expected = [fid(drawn[groups != group], OTHER) for group in range(7)]
    assert left_out(FID, drawn, [OTHER], groups) == pytest.approx(expected)
    score = METRICS["inception_score"]
    assert left_out(score, drawn, [], groups)[3] == score.function(drawn[groups != 3])


def shares(repeats, count):
    """How often intervals hold: of FID over images, of a paired difference of two, of FID over five seeds."""
    generator = torch.Generator().manual_seed(1)
    values, over_seeds, intervals, differences, seen = [], [], [], [], []
    for _ in range(repeats):
        noise = torch.randn(count, SIZE, generator=generator).double()
        models = [noise + 0.5, 1.1 * noise + 0.4]
        without = [left_out(FID, each, [OTHER], groups_of(count)) for each in models]
        one, other = (fid(each, OTHER) for each in models)
        values.append(one)
        seen.append(other - one)
        intervals.append(over_images(one, without[0]).interval)
        differences.append(compared_over_images(one, without[0], other, without[1]).interval)
    truth, apart = statistics.fmean(values), statistics.fmean(seen)
    over_seeds = [of_units(values[place : place + 5]).interval for place in range(0, repeats, 5)]
    pairs = ((intervals, truth), (differences, apart), (over_seeds, truth))
    return [statistics.fmean(low <= value <= high for low, high in each) for each, value in pairs]


def test_intervals_of_gaussians_hold_about_as_often_as_they_say():
    found = shares(60, 200)
    assert all(0.9 <= share <= 1.0 for share in found[:2]), found  # 60 of them tell ±6 points


def test_intervals_of_gaussians_hold_93_to_97_times_in_100():
    found = shares(3000, 400)
    assert all(0.93 <= share <= 0.97 for share in found), found


@pytest.mark.parametrize("key", ["recall", "coverage"])
def test_errors_of_recall_and_coverage_are_those_that_are_seen(key):
    """Leaving out groups instead makes those of recall 1.8 times what is seen, of coverage 1.4 and 1.6 times."""
    generator, metric = torch.Generator().manual_seed(0), METRICS[key]
    reference, groups, values, squares = torch.randn(200, SIZE, generator=generator), groups_of(200), [], []
    for _ in range(60):
        noise = torch.randn(200, SIZE, generator=generator)
        models = [1.1 * noise + 0.2, 1.2 * noise + 0.1]
        without = [left_out(metric, each, [reference], groups) for each in models]
        one, other = (metric.function(each, reference) for each in models)
        found = (over_images(one, without[0]), compared_over_images(one, without[0], other, without[1]))
        values.append([each.mean for each in found])
        squares.append([each.error**2 for each in found])
    for seen, expected in zip(zip(*values, strict=True), zip(*squares, strict=True), strict=True):
        assert 0.75 < math.sqrt(statistics.fmean(expected)) / statistics.stdev(seen) < 1.25


def test_a_paired_difference_is_surer_than_two_sets_of_their_own():
    generator = torch.Generator().manual_seed(0)
    noise, apart = (torch.randn(500, SIZE, generator=generator).double() for _ in range(2))
    sets = [noise + 0.5, 1.05 * noise + 0.5, 1.05 * apart + 0.5]
    values = [fid(each, OTHER) for each in sets]
    without = [left_out(FID, each, [OTHER], groups_of(500)) for each in sets]
    paired, unpaired = (
        compared_over_images(values[0], without[0], values[place], without[place]).error for place in (1, 2)
    )
    assert paired < 0.5 * unpaired
