"""Metrics against closed forms, SciPy, NumPy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from stagepatch.evaluation import fid, kid, nearest_distance, paired_difference, precision, recall
from stagepatch.sampling import spread


def random_features(count, seed, shift=0.0, size=6):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(7))
    return torch.randn(count, size, generator=generator) @ mixing + shift


def test_fid_equals_the_matrix_square_root_form():
    x, y = random_features(200, 0).double().numpy(), random_features(150, 1, 0.5).double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    covariances = cov_x + cov_y - 2 * scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances)
    assert fid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)


def test_fid_of_shifted_copies_is_the_squared_shift():
    x = random_features(300, 0)
    assert fid(x + 2.0, x) == pytest.approx(4.0 * x.shape[1], rel=1e-4)
    assert fid(x, x) == pytest.approx(0.0, abs=1e-6)


def test_kid_equals_the_unbiased_estimator_where_the_subset_is_everything():
    x, y = random_features(80, 0).double(), random_features(80, 1, 0.3).double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum((k.sum() - k.diag().sum()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    assert kid(x, y) == pytest.approx(float(within - 2 * kernel(x, y).mean()), rel=1e-5)


def test_kid_is_the_same_every_time_and_leaves_the_generator_alone():
    x, y = random_features(900, 0), random_features(700, 1, 0.3)
    before = torch.get_rng_state()
    assert kid(x, y) == kid(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_and_recall_equal_brute_force_neighbours():
    x, y = random_features(120, 0), random_features(90, 1, 1.0)

    def share(points, centres, k=3):
        tree = NearestNeighbors(n_neighbors=k + 1).fit(centres.numpy())
        radii = tree.kneighbors(centres.numpy())[0][:, k]
        distances = np.linalg.norm(points.numpy()[:, None] - centres.numpy()[None], axis=2)
        return (distances <= radii).any(axis=1).mean()

    assert precision(x, y) == pytest.approx(share(x, y))
    assert recall(x, y) == pytest.approx(share(y, x))
    assert 0 < precision(x, y) < 1
    assert precision(x, y) != recall(x, y)


def test_of_many_samples_or_references_so_many_spread_over_them_count(monkeypatch):
    x, y = random_features(90, 0), random_features(30, 1, 1.0)
    monkeypatch.setattr("stagepatch.evaluation.neighbours.NEIGHBOURS", 30)
    assert precision(x, y) == precision(x[spread(90, 30)], y) != precision(x[:30], y)
    assert recall(y, x) == recall(y, x[spread(90, 30)]) != recall(y, x[:30])


def test_precision_and_recall_at_the_ends():
    x = random_features(50, 0)
    assert precision(x, x) == recall(x, x) == 1.0
    assert precision(x, x + 1000.0) == recall(x, x + 1000.0) == 0.0


def test_recall_falls_when_samples_cover_one_mode_of_two():
    modes = torch.cat([random_features(100, 0), random_features(100, 1, 100.0)])
    samples = random_features(100, 2)
    assert precision(samples, modes) > 0.8
    assert recall(samples, modes) < 0.55


def test_nearest_distance_equals_numpy():
    images, reference = torch.randn(30, 1, 4, 4), torch.randn(20, 1, 4, 4)
    apart = images.flatten(1).numpy()[:, None] - reference.flatten(1).numpy()[None]
    expected = np.linalg.norm(apart, axis=2).min(axis=1)
    np.testing.assert_allclose(nearest_distance(images, reference, rows=7).numpy(), expected, rtol=1e-4)


def test_paired_difference_by_hand():
    mean, error = paired_difference([10.0, 12.0, 14.0], [9.0, 12.0, 12.0])
    assert mean == pytest.approx(-1.0)
    assert error == pytest.approx(1.0 / math.sqrt(3))
    assert math.isnan(paired_difference([1.0], [2.0])[1])
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])
