"""Likeness of samples against numpy, scikit-learn and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from stagepatch.analysis import analyze_structure, correlation_matrix, cosine_matrix, pair_statistics
from stagepatch.core import UserError


@pytest.fixture
def samples():
    return torch.randn(12, 4, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.7


def test_matrices_are_those_of_numpy_and_scikit_learn(samples):
    flat = samples.flatten(1).double().numpy()
    np.testing.assert_allclose(correlation_matrix(samples).numpy(), np.corrcoef(flat), atol=1e-12)
    np.testing.assert_allclose(cosine_matrix(samples).numpy(), cosine_similarity(flat), atol=1e-12)


def test_statistics_are_of_all_that_is_off_the_diagonal(samples):
    matrix = correlation_matrix(samples)
    pairs = matrix.numpy()[~np.eye(12, dtype=bool)]
    found = pair_statistics(matrix)
    expected = (pairs.max(), pairs.min(), pairs.mean(), pairs.std())
    assert (found.max, found.min, found.mean, found.std) == pytest.approx(expected, abs=1e-12)


def test_closed_forms():
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 2)
    other = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 2, 2)
    found = pair_statistics(correlation_matrix(torch.stack([pattern, -pattern, other + 5.0])))
    assert (found.max, found.min, found.mean) == pytest.approx((0.0, -1.0, -1 / 3))
    assert found.std == pytest.approx((2 / 9) ** 0.5)
    shifted = torch.stack([pattern + 100.0, other + 100.0])  # a shift is a cosine's alone
    assert pair_statistics(correlation_matrix(shifted)).mean == pytest.approx(0.0)
    assert pair_statistics(cosine_matrix(shifted)).mean == pytest.approx(100**2 / (100**2 + 1))


def test_one_sample_is_no_pair_and_a_constant_one_has_no_correlation(samples):
    with pytest.raises(UserError, match="1 samples make no pair"):
        pair_statistics(cosine_matrix(samples[:1]))
    samples[0] = 1.0
    assert np.isnan(pair_statistics(correlation_matrix(samples)).mean)
    assert analyze_structure({"base": samples}, "latents").summary[0].rows[0][2:5] == ["–"] * 3


def test_a_row_for_each_model_and_measure(samples):
    analysis = analyze_structure({"base": samples, "patched": 2 * samples}, "latents")
    rows = analysis.summary[0].rows
    assert [row[:2] for row in rows] == [[m, k] for m in ("base", "patched") for k in ("correlation", "cosine")]
    assert [row[2:] for row in rows[:2]] == [row[2:] for row in rows[2:]]  # of neither does the scale matter
    assert analysis.numbers["samples"] == 12
    assert rows[0][4] == f"{analysis.numbers['base']['correlation']['mean']:+.4f}"
