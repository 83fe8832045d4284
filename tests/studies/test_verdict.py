"""A comparison's verdict, in words, follows its numbers."""

import math

import pytest

from stagepatch.evaluation import Difference
from stagepatch.studies import verdict
from stagepatch.studies.compare_results import Row


def row(name, mean=None, p=0.5, method="dmp", control="", corrected=math.nan, runs=3, **more):
    """A row whose metric is `mean` away from the base's 2.0."""
    value = 2.0 + (mean or 0.0)
    changed = {} if mean is None else {4: Difference(mean, 0.1, p, 2)}
    step = 0 if mean is None else 4
    trained = (10, 100, 0.1, 1.0, 1.0)
    metrics = {"fid_held_out": value, "fid_second": 4.0}
    return Row(
        name,
        method,
        mean is None,
        *trained,
        {step: (value, 0.1)},
        changed,
        metrics,
        control,
        holm=corrected,
        runs=runs,
        **more,
    )


BASE = row("base", method="none")
FREE, STEPS = row("80 steps", -0.1, method="none", control="free"), row("tuned", -0.3, 0.01, control="steps")


def test_no_method_gains():
    said = verdict([BASE, row("A", -0.2, 0.03, corrected=0.06), row("B", 0.3, 0.001, corrected=0.002)], "fid_held_out")
    assert said.startswith("No method gains over the base beyond noise: the best, A, changes fid_held_out by -10.0 %")


def test_a_guide_is_a_method_though_nothing_trains_the_model_itself():
    guided = row("guided", -0.4, method="none", corrected=0.01, is_of_learned=True)
    assert verdict([BASE, guided], "fid_held_out").startswith("guided gains: fid_held_out changes by -20.0 %")
    assert verdict([BASE, FREE], "fid_held_out").startswith("No verdict")
    assert not row("control", method="none", control="parameters", is_of_learned=True).is_method


def test_a_method_gains_though_another_of_more_noise_looks_better():
    said = verdict([BASE, row("noisy", -0.9, 0.2, corrected=0.2), row("A", -0.4, corrected=0.01)], "fid_held_out")
    assert said.startswith("A gains: fid_held_out changes by -20.0 % (95% interval -41.5 to +1.5 %) (p = 0.01 over ")
    assert "corrected for 2 methods" in said
    assert "no control" in said


def against(free, free_p, steps, steps_p):
    return {"80 steps": Difference(free, 0.1, free_p, 2), "tuned": Difference(steps, 0.1, steps_p, 2)}


@pytest.mark.parametrize(
    ("controls", "expected"),
    [
        (
            against(-0.5, 0.01, -0.2, 0.02),
            "A beats all 2 controls; to the nearest, tuned (equal steps), it is -10.0 %",
        ),
        (against(-0.5, 0.01, -0.2, 0.2), "A does not beat, beyond noise, tuned (equal steps: -10.0 %"),
        (against(0.1, 0.01, -0.2, 0.01), "A does not beat, beyond noise, 80 steps (no training: +5.0 %"),
    ],
)
def test_it_names_the_controls_that_stand(controls, expected):
    said = verdict([BASE, FREE, STEPS, row("A", -0.6, corrected=0.01, against=controls)], "fid_held_out")
    assert expected in said


def test_the_others_that_gain_and_beat_every_control_are_named():
    beating, not_beating = against(-0.5, 0.01, -0.2, 0.02), against(-0.5, 0.01, -0.2, 0.2)
    methods = [
        row("C", -0.5, corrected=0.01, against=not_beating),
        row("B", -0.55, corrected=0.01, against=beating),
        row("A", -0.6, corrected=0.01, against=beating),
    ]
    said = verdict([BASE, FREE, STEPS, *methods], "fid_held_out")
    assert said.startswith("A gains")
    assert "So do B (-27.5 %), C (-25.0 %)." in said
    assert "Every control is beaten by B too." in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Difference(-0.02, 0.003, 0.01, 2), "Recall changes by -0.020 [-0.033, -0.007]: it gives up coverage"),
        (Difference(-0.02, 0.03, 0.4, 2), "Recall does not fall beyond noise (-0.020 [-0.149, +0.109])"),
        (Difference(0.02, 0.003, 0.01, 2), "Recall does not fall beyond noise (+0.020"),
    ],
)
def test_it_says_whether_recall_fell(change, expected):
    changes = {"recall": change, "fid_second": Difference(-1.0, 0.1, 0.01, 2)}
    said = verdict([BASE, row("A", -0.6, corrected=0.01, changes=changes)], "fid_held_out")
    assert expected in said
    assert "In the second features FID changes by -25.0 %" in said


def test_one_training_run_is_said_to_be_one():
    assert "of one training run" in verdict([BASE, row("A", -0.6, corrected=0.01, runs=1)], "fid_held_out")
    assert "of one training run" not in verdict([BASE, row("A", -0.6, corrected=0.01)], "fid_held_out")
    assert "of one training run" in verdict([BASE, row("A", -0.6, corrected=0.1, runs=1)], "fid_held_out")


def test_of_a_metric_that_is_to_be_high_more_is_better():
    rows = [BASE, row("A", 0.4, corrected=0.01)]
    for each in rows:
        each.metrics["recall"] = each.curve[each.last][0]
    assert verdict(rows, "recall").startswith("A gains: recall changes by +20.0 %")
    assert verdict(rows, "fid_held_out").startswith("No method gains")


def test_without_a_base_or_a_method_there_is_none():
    assert verdict([row("A", -0.5, corrected=0.01)], "fid_held_out").startswith("No verdict")
    assert verdict([BASE, FREE, STEPS], "fid_held_out").startswith("No verdict")
