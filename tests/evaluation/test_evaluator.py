"""One object that samples and measures models, and the table of metrics that it goes by."""

from dataclasses import replace

import pytest
import torch

from stagepatch import evaluation
from stagepatch.core import UserError
from stagepatch.data import DataConfig, ImageDataset
from stagepatch.evaluation import METRICS, References, direction_note, evaluate, metric_names
from stagepatch.sampling import SamplingConfig
from tests.evaluation.extractors import Counting
from tests.runs import make_dataset, make_model, make_objective

SAMPLING = SamplingConfig(scheduler="ddim", num_inference_steps=2, num_images=12, batch_size=12)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path))


@pytest.fixture
def evaluator():
    return evaluation.Evaluator(References(make_dataset(30), make_dataset(20)), Counting())


def measure(evaluator, seeds):
    return evaluator.measure(make_model(), make_objective().scheduler, SAMPLING, seeds)


def test_real_digits_are_told_from_noise():
    extractor, both = evaluation.load_extractor("digits"), evaluation.load_references(DataConfig())
    real = evaluate(both.held_out.images, References(both.train, None), extractor)
    noise = evaluate(torch.randn(599, 1, 8, 8), both, extractor)
    assert real["fid_train"] < 0.2 < noise["fid_train"]
    assert real["precision"] > 0.8 > noise["precision"]
    assert real["nearest_train"] < noise["nearest_train"]
    assert evaluate(both.train.images, both, extractor)["nearest_train"] == pytest.approx(0.0, abs=1e-2)
    assert "fid_held_out" not in real
    assert [*noise, "fid_second"] == [*(key for key in metric_names("") if key != "fid_second"), "fid_second"]


def test_references_are_hashed_and_computed_once_for_all_seeds_and_models(evaluator, monkeypatch):
    keys, key = [], evaluation.references._key
    monkeypatch.setattr(evaluation.references, "_key", lambda *given: keys.append(given) or key(*given))
    measured = measure(evaluator, [0, 1, 2])
    measure(evaluator, [0])
    measure(evaluator.without_held_out(), [0])
    # Of training and of held-out images, and for each of the five sets of samples.
    assert (len(keys), evaluator.extractor.calls, len(measured.metrics)) == (2, 2 + 5, 3)
    assert measured.values("kid")[0] != measured.values("kid")[1]
    assert torch.equal(measured.images, measure(evaluator, [0]).images)


def test_without_held_out_images_the_training_ones_stand_in(evaluator):
    alone = evaluator.without_held_out()
    assert torch.equal(alone.reference("unseen"), evaluator.reference("train"))
    assert torch.equal(evaluator.reference("unseen"), evaluator.reference("held_out"))
    assert alone.reference("held_out") is None
    images = torch.randn(15, 1, 8, 8)
    assert set(evaluator.metrics(images)) - set(alone.metrics(images)) == {"fid_held_out"}
    assert evaluator.references.held_out is not None


def test_labels_are_the_training_images_in_turn(evaluator):
    assert evaluator.labels(32).tolist() == [*evaluator.references.train.labels.tolist(), 0, 1]
    few = ImageDataset(torch.zeros(2, 1, 8, 8), torch.tensor([7, 3]))
    evaluator.references = replace(evaluator.references, train=few)
    assert evaluator.labels(5).tolist() == [7, 3, 7, 3, 7]


def test_a_metric_is_one_entry(evaluator, monkeypatch):
    mean = lambda samples, reference: float(samples.mean())  # noqa: E731
    monkeypatch.setitem(METRICS, "brightness", evaluation.Metric("brightness, {features}", mean, "pixels", "higher"))
    measured = measure(evaluator, [0])
    assert measured.values("brightness") == [pytest.approx(float(measured.images.clamp(-1, 1).mean()))]
    assert metric_names("digits features")["brightness"] == "brightness, digits features"
    assert METRICS["brightness"].sign == -1.0
    assert "brightness" in direction_note(METRICS)


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        (["fid_train"], "Lower is better."),
        (["precision"], "Higher is better."),
        (["precision", "recall"], "Higher is better."),
        (["kid", "recall"], "Lower is better; of recall, higher."),
        (METRICS, "Lower is better; of precision and recall, higher."),
    ],
)
def test_tables_say_which_way_is_better(keys, note):
    assert direction_note(keys) == note


def test_fid_is_never_called_plain():
    names = metric_names("digits features")
    assert all("features)" in name for key, name in names.items() if "fid" in key)
    assert "(digits features)" in names["fid_held_out"]


def test_a_second_opinion_is_measured_on_the_same_images():
    both = evaluation.load_references(DataConfig(source="fashion"), "tune")
    first, second = (evaluation.load_extractor(name) for name in ("fashion", "fashion_vit"))
    images = both.train.images[:300]
    found = evaluation.Evaluator(both, first, second=second).metrics(images, ["fid_held_out", "fid_second"])
    alone = evaluation.Evaluator(both, second).metrics(images, ["fid_held_out"])
    assert found["fid_second"] == alone["fid_held_out"] != found["fid_held_out"]


def test_without_held_out_images_the_second_opinion_sees_none_either():
    both = References(make_dataset(30), make_dataset(20))
    alone = evaluation.Evaluator(both, Counting(), second=Counting()).without_held_out()
    assert torch.equal(alone.reference("second"), alone.reference("train"))
    assert len(alone.reference("second")) == 30


@pytest.mark.parametrize("extractors", [("fashion", ""), ("digits", "fashion")])
def test_an_extractor_that_does_not_fit_is_refused_before_anything_is_sampled(tmp_path, extractors):
    with pytest.raises(UserError, match="set extractor to: digits"):
        evaluation.Evaluator.load("digits", DataConfig(), extractors[0], tmp_path, second=extractors[1])
