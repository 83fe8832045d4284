"""Interval clustering against every way to cut a few timesteps, its costs written out."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from stagepatch.core.errors import UserError
from stagepatch.diffusion import (
    IntervalSampler,
    Objective,
    ObjectiveConfig,
    cluster_intervals,
    equal_in_t,
    gradient_distances,
    log_snr_distances,
    make_scheduler,
    timestep_distances,
)
from stagepatch.diffusion.clustering import interval_costs

T = 11
SNR = torch.tensor(np.geomspace(3e4, 1e-3, T) * np.linspace(1.0, 9.0, T))


def cosines(seed=0, count=T):
    gradients = np.random.default_rng(seed).normal(size=(count, 3)).cumsum(axis=0)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return torch.tensor(gradients @ gradients.T)


def cost(intervals, kind):
    """Sum over intervals of what the members are worth to the middle one, member by member."""
    total = 0.0
    for first, stop in intervals:
        middle = first + (stop - first) // 2
        for t in range(first, stop):
            if kind == "timestep":
                total += abs(t - middle)
            elif kind == "snr":
                total += abs(float(np.log(SNR[t]) - np.log(SNR[middle])))
            else:
                total -= float(cosines()[middle, t])
    return total


DISTANCES = {
    "timestep": lambda: timestep_distances(T),
    "snr": lambda: log_snr_distances(SNR),
    "gradient": lambda: gradient_distances(cosines()),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4, T])
@pytest.mark.parametrize("kind", list(DISTANCES))
def test_no_other_cuts_cost_less(kind, count):
    found = cluster_intervals(DISTANCES[kind](), count)
    assert [first for first, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == T
    ways = [list(itertools.pairwise([0, *cuts, T])) for cuts in itertools.combinations(range(1, T), count - 1)]
    costs = [cost(way, kind) for way in ways]
    assert len(found) == count
    assert cost(found, kind) == pytest.approx(min(costs), abs=1e-9)
    if kind != "timestep":  # whose best cuts are several
        assert found == ways[int(np.argmin(costs))]


@pytest.mark.parametrize("kind", list(DISTANCES))
def test_cost_of_every_interval_is_that_of_its_members(kind):
    found = interval_costs(DISTANCES[kind]())
    for first, last in itertools.product(range(T), repeat=2):
        expected = cost([(first, last + 1)], kind) if first <= last else np.inf
        assert float(found[first, last]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_equal_intervals_cost_no_more_than_the_best(count):
    assert cost(equal_in_t(T, count), "timestep") == cost(cluster_intervals(timestep_distances(T), count), "timestep")


def test_a_thousand_timesteps_are_cut_where_gradients_turn():
    affinity = torch.full((1000, 1000), -0.5)
    for first, stop in ((0, 130), (130, 700), (700, 1000)):
        affinity[first:stop, first:stop] = 0.9
    assert cluster_intervals(gradient_distances(affinity), 3) == [(0, 130), (130, 700), (700, 1000)]


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_intervals_of_log_snr_are_finite_for_every_schedule(prediction):
    objective = Objective(make_scheduler(ObjectiveConfig(prediction_type=prediction)))
    intervals = cluster_intervals(log_snr_distances(objective.snr(torch.arange(1000))), 5)
    lengths = [stop - first for first, stop in intervals]
    assert sum(lengths) == 1000
    assert len(lengths) == 5
    assert lengths[0] < 200  # near the image log-SNR falls fastest


def test_what_cannot_be_cut():
    with pytest.raises(UserError, match="11 timesteps cannot be cut into 12 intervals"):
        cluster_intervals(timestep_distances(T), 12)
    with pytest.raises(UserError, match="not finite"):
        cluster_intervals(gradient_distances(torch.full((3, 3), torch.nan)), 2)


def test_every_interval_is_drawn_alike_and_uniformly_within():
    sampler = IntervalSampler(((0, 100), (100, 900), (900, 1000)))
    drawn = sampler.draw(300_000, torch.Generator().manual_seed(0)).view(-1, 3)
    for (first, stop), own in zip(sampler.intervals, drawn.T, strict=True):
        assert first <= own.min()
        assert own.max() < stop
        counts = torch.bincount((own - first) * 20 // (stop - first), minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
