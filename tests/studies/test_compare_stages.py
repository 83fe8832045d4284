"""Rows whose ranges of timesteps are trained apart, and rows that share a training."""

import json
import shutil

import pytest

from stagepatch.core import read_json
from tests.studies.conftest import study

SMALL = {
    "training": {"steps": 3, "batch_size": 8, "learning_rate": 0.01, "log_every": 1},
    "sampling": {"num_images": 60, "num_inference_steps": 4, "batch_size": 60},
}
STAGED = {"method": "lora", "num_stages": 2}
MORE = {"num_inference_steps": 6}


def compare(folder, *entries, **changes):
    return study("compare", folder, **{**SMALL, "entries": [{"name": "base", "method": "none"}, *entries], **changes})


def metrics_of(folder, job):
    return read_json(folder / "out" / "jobs" / job / "metrics.json")["3"]


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "out" / "results.json").read_text())}


def test_a_row_of_stages_is_what_decouple_trains_and_the_schedule_samples(tmp_path):
    training = {**SMALL["training"], "lr_scheduler": "constant", "ema_decay": 0.0}
    assert study("decouple", tmp_path, preset="experts", num_stages=2, method="lora", training=training) == 0
    by_hand = {"name": "by hand", "method": "none", "schedule": str(tmp_path / "out" / "experts.yaml")}
    one = {"name": "one", "method": "lora"}
    assert compare(tmp_path / "then", {"name": "staged", **STAGED}, one, by_hand) == 0
    staged, alone = metrics_of(tmp_path / "then", "staged-0"), metrics_of(tmp_path / "then", "one-0")
    assert staged == metrics_of(tmp_path / "then", "by-hand")
    assert staged != alone
    rows = rows_of(tmp_path / "then")
    assert rows["staged"]["trainable"] == 2 * rows["one"]["trainable"]
    assert rows["staged"]["file_size"] == pytest.approx(2 * rows["one"]["file_size"], rel=0.01)
    assert rows["by hand"]["holm"] == rows["staged"]["holm"] <= 1.0  # learned elsewhere, and a method all the same


def test_rows_of_other_sampling_train_once(tmp_path):
    rows = [{"name": name, **STAGED, "sampling": sampling} for name, sampling in (("few", {}), ("more", MORE))]
    other = {"name": "other rate", "method": "lora", "training": {"learning_rate": 0.02}}
    assert compare(tmp_path, *rows, other, training_seeds=[0, 1]) == 0
    jobs = tmp_path / "out" / "jobs"
    assert {path.parent.name for path in jobs.glob("*/learned")} == {"few-0", "few-1", "other-rate-0", "other-rate-1"}
    assert metrics_of(tmp_path, "few-0") != metrics_of(tmp_path, "more-0")
    assert metrics_of(tmp_path, "more-0") != metrics_of(tmp_path, "more-1")
    results = rows_of(tmp_path)
    assert results["more"]["file_size"] == results["few"]["file_size"] > 0
    first = {name: metrics_of(tmp_path, name) for name in ("few-0", "more-0")}

    shutil.rmtree(jobs / "few-0")  # the row that trains is gone: what the other measured stays, and it is trained anew
    assert compare(tmp_path, *rows, other, training_seeds=[0, 1]) == 0
    assert {name: metrics_of(tmp_path, name) for name in first} == first


def test_what_shared_a_training_stays_when_the_row_that_trained_is_left_out(tmp_path):
    few, more = {"name": "few", "method": "lora"}, {"name": "more", "method": "lora", "sampling": MORE}
    assert compare(tmp_path, few, more) == 0
    results = rows_of(tmp_path)["more"]
    assert compare(tmp_path, more) == 0
    assert rows_of(tmp_path)["more"]["file_size"] == results["file_size"]
    assert rows_of(tmp_path)["more"]["curve"] == results["curve"]


def test_rows_of_other_steps_are_alike_in_the_quick_form_and_run(tmp_path):
    rows = [{"name": str(steps), "method": "bitfit", "training": {"steps": steps}} for steps in (3, 4)]
    assert compare(tmp_path, *rows, quick=True) == 0


def test_a_row_that_began_a_training_of_its_own_keeps_it(tmp_path):
    more = {"name": "more", "method": "lora", "sampling": MORE}
    assert compare(tmp_path, more) == 0
    assert compare(tmp_path, {"name": "few", "method": "lora"}, more) == 0
    assert {path.parent.name for path in (tmp_path / "out" / "jobs").glob("*/learned")} == {"more-0", "few-0"}


def test_two_names_for_one_row_are_refused(refused):
    entries = [{"name": "a", "method": "dmp"}, {"name": "b", "method": "dmp", "training": {"steps": 3}}]
    message = refused("compare", **{**SMALL, "entries": entries})
    assert "Entries 'a' and 'b' train and sample alike" in message


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"method": "none", "num_stages": 2}, {}, "num_stages=2 are ranges, each trained apart"),
        ({"method": "lora", "num_stages": 1}, {}, "num_stages=1 are ranges, each trained apart"),
        ({"method": "lora", "num_stages": 2, "timesteps": {"range": [0.0, 0.5]}}, {}, "num_stages goes without"),
        ({"method": "lora", "num_stages": 2}, {"evaluate_every": 1}, "num_stages goes without"),
        ({"method": "lora", "num_stages": 2, "start_from": "a"}, {}, "num_stages goes without"),
        ({"method": "lora", "num_stages": 10**6}, {}, "1000 timesteps cannot be split into 1000000 ranges"),
    ],
    ids=str,
)
def test_ranges_that_cannot_be_are_refused_before_any_training(refused, entry, changes, message):
    assert message in refused("compare", **{**SMALL, "entries": [{"name": "a", **entry}], **changes})
