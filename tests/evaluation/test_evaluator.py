"""One object that samples and measures models, and the table of metrics that it goes by."""

from dataclasses import replace

import pytest
import torch

from stagepatch import evaluation
from stagepatch.core import UserError
from stagepatch.data import DataConfig, ImageDataset
from stagepatch.evaluation import METRICS, References, chosen, direction_note, evaluate, metric_names
from stagepatch.sampling import SamplingConfig, spread
from tests.evaluation.extractors import Counting
from tests.runs import make_dataset, make_model, make_objective
from tests.training.test_train_on_pipelines import draw_images

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
    assert [*noise] == [key for key in chosen(None) if key != "fid_second"]


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


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("count", [100, 777, 5000])
def test_any_number_of_labels_has_the_shares_of_the_training_images_whatever_their_order(evaluator, order, count):
    labels = torch.arange(10).repeat_interleave(torch.arange(100, 1100, 100))  # 100 of class 0 … 1,000 of class 9
    if order == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    evaluator.references = replace(evaluator.references, train=ImageDataset(torch.zeros(len(labels), 1), labels))
    found = torch.bincount(evaluator.labels(count), minlength=10).double()
    expected = torch.bincount(labels).double() / len(labels) * count
    assert float((found - expected).abs().max()) <= 2.5
    assert torch.equal(evaluator.labels(count), evaluator.labels(5000)[:count])  # more images keep the first
    assert torch.equal(evaluator.labels(len(labels)).sort().values, labels.sort().values)


def test_a_folder_sorted_by_class_is_sampled_in_all_its_classes(tmp_path):
    for name in ("ant", "bee", "cat", "dog"):
        draw_images(tmp_path / name, count=6, size=(8, 8), captions=False)
    data = DataConfig(source=str(tmp_path), image_size=8, channels=1)
    evaluator = evaluation.Evaluator(evaluation.load_references(data), Counting())
    assert torch.bincount(evaluator.labels(8)).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 1000])
def test_spread_takes_each_once_before_any_again(total):
    found = spread(total, 3 * total)
    for turn in found.split(total):
        assert torch.equal(turn.sort().values, torch.arange(total))


def test_a_metric_is_one_entry(evaluator, monkeypatch):
    mean = lambda samples, reference: float(samples.mean())  # noqa: E731
    metric = evaluation.Metric("brightness, {features}", mean, "train", "higher", of="pixels")
    monkeypatch.setitem(METRICS, "brightness", metric)
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
        (["kid", "recall", "vendi", "density"], "Lower is better; of recall, Vendi score and density, higher."),
        (chosen(None), "Lower is better; of precision and recall, higher."),
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
    assert torch.equal(alone.reference("unseen", "second"), alone.reference("train"))
    assert len(alone.reference("unseen", "second")) == 30


@pytest.mark.parametrize("extractors", [("fashion", ""), ("digits", "fashion")])
def test_an_extractor_that_does_not_fit_is_refused_before_anything_is_sampled(tmp_path, extractors):
    with pytest.raises(UserError, match="set extractor to: digits"):
        evaluation.Evaluator.load("digits", DataConfig(), extractors[0], tmp_path, second=extractors[1])
