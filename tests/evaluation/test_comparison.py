"""Tables of a base and another model: no difference without its interval."""

import pytest
import torch
from scipy import stats

from stagepatch.evaluation import Measured, comparison_note, comparison_table
from stagepatch.evaluation.comparison import change, estimate

NONE = torch.empty(0)
BASE = Measured([{"fid_train": value, "recall": 0.5} for value in (2.0, 2.2, 2.1)], NONE)
OTHER = Measured([{"fid_train": value, "recall": 0.5 + value / 100} for value in (1.8, 1.9, 2.0)], NONE)


def test_intervals_are_over_seeds_and_differences_paired_by_them():
    columns, rows = comparison_table(BASE, OTHER, "digits features", "patched")
    assert columns[-3:] == ["difference, paired", "in percent", "p (Holm, 2 metrics)"]
    found = stats.ttest_rel((1.8, 1.9, 2.0), (2.0, 2.2, 2.1))
    low, high = found.confidence_interval(0.95)
    assert rows[0][3] == f"-0.2000 [{low:+.4f}, {high:+.4f}]"
    assert rows[0][4] == f"-9.5 [{low / 0.021:+.1f}, {high / 0.021:+.1f}] %"
    other = stats.ttest_1samp((0.018, 0.019, 0.02), 0).pvalue
    assert [float(row[5]) for row in rows] == pytest.approx([found.pvalue, 2 * other], abs=5e-4)
    own = stats.ttest_1samp((2.0, 2.2, 2.1), 0).confidence_interval(0.95)
    assert rows[0][1] == f"2.1000 [{own.low:.4f}, {own.high:.4f}]"
    assert "over 3 sampling seeds" in comparison_note(BASE)
    assert "another training run they say nothing" in comparison_note(BASE)


def test_of_one_seed_they_are_over_its_images():
    without = {"fid_train": [2.0, 2.2, 1.9, 2.1]}
    one = Measured([{"fid_train": 2.0}], NONE, without)
    other = Measured([{"fid_train": 1.5}], NONE, {"fid_train": [value - 0.5 for value in without["fid_train"]]})
    assert estimate(one, "fid_train").error == pytest.approx((3 / 4 * 0.05) ** 0.5)
    assert change(one, other, "fid_train").error == pytest.approx(0.0, abs=1e-9)  # the noise is shared
    _, rows = comparison_table(one, other, "digits features")
    assert rows[0][3] == "-0.5000 [-0.5000, -0.5000]"
    assert "the images of one sampling seed" in comparison_note(one)
    assert "paired" not in comparison_note(one, is_compared=False)


def test_a_difference_without_an_interval_is_not_shown():
    one, other = (Measured([{"fid_train": value}], NONE) for value in (2.0, 1.5))
    _, rows = comparison_table(one, other, "digits features")
    assert rows == [["FID (digits features), training images", "2.0000", "1.5000", "", "", ""]]
    assert "no interval" in comparison_note(one)
    assert comparison_table(one, None, "digits features") == (["metric", "base"], [rows[0][:2]])
