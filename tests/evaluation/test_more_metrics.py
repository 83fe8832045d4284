"""Kernels, neighbours and scores against torchmetrics, scikit-learn, NumPy, closed forms and small cases by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stagepatch.core import UserError
from stagepatch.evaluation import (
    METRICS,
    Statistics,
    clip_score,
    cmmd,
    coverage,
    density,
    fid,
    fid_infinity,
    frechet_distance,
    inception_score,
    kernels,
    kid,
    memorised,
    memorised_features,
    neighbours,
    over_images,
    vendi,
)
from stagepatch.evaluation.halves import balanced_halves, without_by_halves
from tests.evaluation.test_metrics import random_features


def test_kid_is_torchmetrics_on_subsets():
    x, y = random_features(240, 0).double(), random_features(200, 1, 0.3).double()
    extractor = nn.Identity()
    extractor.num_features = x.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = KernelInceptionDistance(feature=extractor, subsets=50, subset_size=200)
        reference.update(y, real=True)
        reference.update(x, real=False)
        assert kid(x, y) == pytest.approx(float(reference.compute()[0]), rel=1e-9)


def test_cmmd_is_the_mean_discrepancy_of_scikit_learns_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 32)
    x, y = random_features(80, 0).double(), random_features(70, 1, 0.5).double()
    a, b = (each.numpy() / np.linalg.norm(each.numpy(), axis=1, keepdims=True) for each in (x, y))
    gamma = 1 / (2 * 10.0**2)
    means = [rbf_kernel(one, other, gamma).mean() for one, other in ((a, a), (b, b), (a, b))]
    assert cmmd(x, y) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-6)
    assert cmmd(3 * x, y) == pytest.approx(cmmd(x, y))  # lengths do not count
    assert cmmd(x, x) == pytest.approx(0.0, abs=1e-9)


def test_density_and_coverage_equal_brute_force_neighbours(monkeypatch):
    x, y = random_features(120, 0).double(), random_features(90, 1, 1.0).double()
    tree = NearestNeighbors(n_neighbors=6).fit(y.numpy())
    radii = tree.kneighbors(y.numpy())[0][:, 5]
    inside = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2) <= radii
    assert density(x, y) == pytest.approx(inside.sum(axis=1).mean() / 5)
    assert coverage(x, y, rows=17) == pytest.approx(inside.any(axis=0).mean())
    assert density(y, y) == pytest.approx(1 + 1 / 5)  # itself, and the 5 whose neighbour it is, on average


def test_density_and_coverage_by_hand():
    reference = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    # With k = 1 each ball has radius 1.
    samples = torch.tensor([[0.5], [0.6], [20.0]])
    assert density(samples, reference, k=1) == pytest.approx((2 + 2 + 0) / 3)
    assert coverage(samples, reference, k=1) == pytest.approx(2 / 4)


def test_inception_score_is_torchmetrics_and_in_closed_form():
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 2
    extractor = nn.Identity()
    reference = InceptionScore(feature=extractor, splits=1)
    reference.update(logits)
    assert inception_score(logits) == pytest.approx(float(reference.compute()[0]), rel=1e-5)
    assert inception_score(torch.eye(7).repeat(3, 1) * 100) == pytest.approx(7.0)  # sure, and of all classes alike
    assert inception_score(torch.ones(5, 7)) == pytest.approx(1.0)


def test_vendi_is_that_of_the_matrix_of_similarities():
    x = random_features(40, 0)
    values = np.linalg.eigvalsh(pairwise_cosine_similarity(x, zero_diagonal=False).numpy().astype(float) / 40)
    values = values[values > 1e-9]
    assert vendi(x) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-4)
    assert vendi(torch.eye(6).repeat(4, 1)) == pytest.approx(6.0)  # six different images, four times each
    assert vendi(torch.ones(9, 5)) == pytest.approx(1.0)


def test_clip_score_by_hand():
    images = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    captions = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-1.0, 0.0]])
    assert clip_score(images, captions) == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3)


def test_memorised_is_one_in_twenty_of_new_images_and_all_of_copies():
    train, held_out, new = (random_features(count, seed) for count, seed in ((300, 0), (400, 1), (2000, 2)))
    assert memorised_features(new, train, held_out) == pytest.approx(0.05, abs=0.02)
    assert memorised_features(train[:50] + 1e-4, train, held_out) == 1.0
    assert memorised_features(new + 100, train, held_out) == 0.0
    nearest = NearestNeighbors(n_neighbors=1).fit(train.numpy())
    of_new, of_held_out = (nearest.kneighbors(each.numpy())[0][:, 0] for each in (new, held_out))
    expected = (of_new < np.sort(of_held_out)[20]).mean()
    assert memorised_features(new, train, held_out) == pytest.approx(expected, abs=1e-3)
    assert memorised(torch.tensor([1.9, 2.1]), torch.arange(1.0, 21.0)) == 0.5  # of 20, one lies below 2


def test_fid_infinity_is_near_that_of_the_distributions():
    size = 20
    truth = frechet_distance(
        Statistics(0, torch.full((size,), 0.3).double(), torch.eye(size).double()),
        other := Statistics(0, torch.zeros(size).double(), 2 * torch.eye(size).double()),
    )
    drawn = torch.randn(1500, size, generator=torch.Generator().manual_seed(0)) + 0.3
    assert truth == pytest.approx(size * (0.09 + (math.sqrt(2) - 1) ** 2))
    assert abs(fid_infinity(drawn, other) - truth) < 0.5 * abs(fid(drawn[:300], other) - truth)
    assert fid_infinity(drawn, other) < fid(drawn, other)
    assert fid_infinity(drawn, other) == fid_infinity(drawn, other)


OWN_TESTS = ("kid", "recall", "coverage", "clip_score", "vendi")
GROUPED = [key for key, metric in METRICS.items() if metric.without is not None and key not in OWN_TESTS]


def arguments(key):
    generator = torch.Generator().manual_seed(3)
    x, y = random_features(60, 0), random_features(50, 1, 0.5)
    if key == "memorised_pixels":
        return torch.rand(60, generator=generator), torch.rand(50, generator=generator) + 0.2
    return (x, random_features(70, 4), y) if key == "memorised_features" else (x, y)


@pytest.mark.parametrize("key", GROUPED)
def test_without_a_group_is_the_metric_of_the_others(key, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 16)
    monkeypatch.setattr(neighbours, "_ROWS", 16)
    samples, *references = arguments(key)
    groups, metric = torch.arange(60) % 7, METRICS[key]
    expected = [metric.function(samples[groups != group], *references) for group in range(7)]
    found = metric.without(samples, *references, groups)
    constant = 0.0
    if key == "cmmd":  # the term of the reference alone is left out
        y = nn.functional.normalize(references[0], dim=1).double()
        constant = 1000 * float(torch.exp((y @ y.T - 1) / 100).mean())
    assert [value + constant for value in found] == pytest.approx(expected, rel=1e-6)
    assert len({*found}) > 1


def test_scores_without_a_group_are_those_of_the_others():
    images, captions, groups = random_features(60, 0), random_features(60, 1), torch.arange(60) % 7
    expected = [clip_score(images[groups != group], captions[groups != group]) for group in range(7)]
    assert kernels.clip_score_without(images, captions, groups) == pytest.approx(expected)
    expected = [vendi(images[groups != group]) for group in range(7)]
    assert kernels.vendi_without(images, groups) == pytest.approx(expected)


def test_kid_without_a_group_is_that_of_all_pairs_of_the_others():
    x, y = random_features(60, 0).double(), random_features(50, 1, 0.5).double()
    groups = torch.arange(60) % 6

    def of(rest):
        k = lambda a, b: (a @ b.T / 6 + 1) ** 3  # noqa: E731
        n, within = len(rest), k(rest, rest)
        return float((within.sum() - within.diag().sum()) / (n * (n - 1)) - 2 * k(rest, y).mean())

    assert kernels.kid_without(x, y, groups) == pytest.approx([of(x[groups != group]) for group in range(6)])


def test_halves_of_a_mean_give_it_without_each_group():
    halves = balanced_halves()
    assert halves.sum(dim=1).tolist() == [10] * 19
    signs = 2.0 * halves.double() - 1.0
    assert torch.equal(signs @ signs.T, 20.0 * torch.eye(19).double())
    values, groups = torch.rand(60, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 20

    def gaps(samples, reference, halves):
        return torch.stack([samples[half].mean() - samples[~half].mean() for half in halves])

    expected = [float(values[groups != group].mean() - values.mean()) for group in range(20)]
    assert without_by_halves(gaps, values, torch.zeros(2), groups) == pytest.approx(expected)


def share_near(key, samples, reference, places):
    """Of some references, by scikit-learn: of recall, within a sample's radius among the samples; of coverage, with a
    sample within the reference's own radius, of twice as many neighbours as among all."""
    of, k = (samples, 3) if key == "recall" else (reference, 10)
    radii = NearestNeighbors(n_neighbors=k + 1).fit(of).kneighbors(of)[0][:, k]
    radii = radii[None] if key == "recall" else radii[places, None]
    return (np.linalg.norm(reference[places, None] - samples[None], axis=2) <= radii).any(axis=1).mean()


def variance_of_coverage(samples, reference):
    """By sets of samples in each ball: all pairs of balls that hold the same, by how many they hold."""
    near = NearestNeighbors(n_neighbors=6).fit(reference)
    radii, apart = near.kneighbors(reference)[0][:, 5], np.linalg.norm(reference[:, None] - samples[None], axis=2)
    held = [frozenset(np.flatnonzero(row <= radius)) for row, radius in zip(apart, radii, strict=True)]
    weights = [sum(math.comb(7, n) for n in range(c, 8)) / 2**7 * (1 if c % 2 else -1) for c in range(9)]
    pairs = sum(weights[min(len(a), 8)] for a in held for b in held if a and a == b)
    return (pairs - sum(len(a) == 1 for a in held) ** 2 / len(samples)) / len(reference) ** 2


@pytest.mark.parametrize("key", ["recall", "coverage"])
def test_errors_of_recall_and_coverage_are_those_of_their_halves(key, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS", 16)
    x, y = random_features(63, 0).double().numpy(), random_features(51, 1, 0.5).double().numpy()
    groups, halves, gaps = torch.arange(63) % 20, balanced_halves(), []
    for place, half in enumerate(halves[:, groups].numpy()):
        one, other = (share_near(key, x[of], y, np.arange(place % 2, 51, 2)) for of in (half, ~half))
        gaps.append(one - other)
    expected = torch.tensor(gaps) @ (0.5 - halves.double()) / 19
    error = math.sqrt(sum(gap**2 for gap in gaps) / 19 / 4)
    if key == "coverage":
        expected *= math.sqrt(variance_of_coverage(x, y)) / error
        error = math.sqrt(variance_of_coverage(x, y))
    without, x, y = METRICS[key].without, torch.from_numpy(x), torch.from_numpy(y)
    found = torch.tensor(without(x, y, groups)).double()
    torch.testing.assert_close(found - found.mean(), expected - expected.mean(), atol=1e-7, rtol=1e-5)
    assert over_images(0.5, found.tolist()).error == pytest.approx(error)
    assert all(math.isnan(value) for few in (x[:19], x[:1]) for value in without(few, y, groups[: len(few)]))
    assert all(math.isnan(value) for value in without(x, y[:1], groups))


@pytest.mark.parametrize("function", [kid, cmmd])
def test_features_of_other_dimensions_are_refused(function):
    with pytest.raises(UserError, match="6 dimensions cannot be compared with those of 5"):
        function(random_features(20, 0), random_features(20, 0, size=5))
