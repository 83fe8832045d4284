"""Statistics gathered in batches, and the Fréchet distance, against NumPy, SciPy and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stagepatch.core import UserError
from stagepatch.evaluation import RunningStatistics, Statistics, fid, frechet_distance


def features(count, size=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(7))
    return torch.randn(count, size, generator=generator) @ mixing + shift


def by_sqrtm(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    one, other = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root)


def assert_same(one, other):
    assert one.count == other.count
    torch.testing.assert_close((one.mean, one.covariance), (other.mean, other.covariance))


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (7, 1, 50, 42), (33, 33, 34)])
@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_batches_give_numpys_mean_and_covariance(sizes, shift):
    all_rows = features(100).double() + shift
    running = RunningStatistics()
    for part in all_rows.split(list(sizes)):
        running.update(part)
    found = running.statistics()
    assert found.count == 100
    np.testing.assert_allclose(found.mean, all_rows.numpy().mean(0), rtol=1e-12)
    expected = np.cov((all_rows - shift).numpy(), rowvar=False)
    # 1e5 itself leaves 11 digits of the numbers.
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-12 if not shift else 1e-8, atol=1e-8)
    torch.testing.assert_close(Statistics.gathered(all_rows.split(9)).covariance, found.covariance)


def test_what_two_processes_gathered_is_merged():
    rows, halves = features(90), [RunningStatistics(), RunningStatistics()]
    halves[0].update(rows[:31])
    halves[1].update(rows[31:])
    halves[0].merge(halves[1])
    halves[0].merge(RunningStatistics())
    assert_same(halves[0].statistics(), Statistics.of(rows))
    again = RunningStatistics()
    again.merge(halves[1])
    again.update(rows[:31])  # leaves the other as it was
    assert halves[1].count == 59
    assert_same(halves[1].statistics(), Statistics.of(rows[31:]))


@pytest.mark.parametrize("counts", [(300, 200), (8, 200), (200, 8), (9, 7)])
def test_the_distance_is_that_of_the_matrix_square_root(counts):
    x, y = features(counts[0]), features(counts[1], seed=1, shift=0.4)
    y[:, 5] = 0.0  # a feature that is always off
    assert fid(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-6)
    assert fid(y, x) == pytest.approx(fid(x, y), rel=1e-6)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == fid(x, y) == fid(Statistics.of(x), y)


def test_the_distance_is_torchmetrics():
    x, y = features(300), features(250, seed=1, shift=0.4)
    extractor = nn.Identity()
    extractor.num_features = x.shape[1]
    reference = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
    reference.update(x.double(), real=True)
    reference.update(y.double(), real=False)
    assert fid(y, x) == pytest.approx(float(reference.compute()), rel=1e-9)


def test_the_distance_of_gaussians_whose_axes_agree_is_in_closed_form():
    ones, others = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.0])
    one = Statistics(10, torch.zeros(3).double(), ones.diag().double())
    other = Statistics(10, torch.tensor([1.0, 0.0, 2.0]).double(), others.diag().double())
    expected = 1 + 4 + (ones.sqrt() - others.sqrt()).square().sum()
    assert frechet_distance(one, other) == pytest.approx(float(expected))
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(value):
    rows = features(20)
    rows[[3, 7], 2] = value
    with pytest.raises(UserError, match=r"features of 2 of 20 images.*NaN or infinite"):
        fid(rows, features(20))


def test_other_refusals_and_the_note_on_few_images():
    with pytest.raises(UserError, match="12 dimensions cannot be compared with those of 5"):
        fid(features(20), features(20, size=5))
    running = RunningStatistics()
    running.update(features(4))
    with pytest.raises(UserError, match="12 dimensions"):
        running.update(features(4, size=5))
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        Statistics.of(features(1))
    assert "12 images for 12 dimensions" in Statistics.of(features(12)).note()
    assert Statistics.of(features(13)).note() == ""


def test_of_two_alike_it_is_never_less_than_zero():
    """Rounding leaves some 1e-15 of either sign; a table showed -0.0000."""
    for seed in range(8):
        features = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))
        assert 0.0 <= fid(features, features) < 1e-9
