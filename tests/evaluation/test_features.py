"""The digits classifier, the extractors and the cache of reference features."""

import json

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig, in_memory, load_dataset, load_digits
from stagepatch.evaluation import (
    References,
    digits_classifier,
    evaluate,
    load_extractor,
    load_references,
    metric_names,
    reference,
)
from stagepatch.evaluation.features import extract_features, fingerprint
from tests.training.test_train_on_pipelines import draw_images


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


def test_the_bundled_classifier_has_its_recorded_accuracy():
    recorded = json.loads((digits_classifier.ASSET / "config.json").read_text())["held_out_accuracy"]
    assert digits_classifier.held_out_accuracy(digits_classifier.load_classifier()) == pytest.approx(
        recorded, abs=1e-4
    )
    assert recorded >= 0.985


def test_training_never_asks_for_the_held_out_third(monkeypatch):
    asked = []

    def spy(split):
        asked.append(split)
        return load_digits(split)

    monkeypatch.setattr(digits_classifier, "load_digits", spy)
    digits_classifier.train_digits_classifier(steps=3)
    assert asked == ["train"]


def test_the_command_writes_a_classifier_that_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits_classifier, "train_digits_classifier", lambda: digits_classifier.load_classifier())
    monkeypatch.setattr("sys.argv", ["digits_classifier", "--output_dir", str(tmp_path)])
    digits_classifier.main()
    assert "Held-out accuracy 0.9" in capsys.readouterr().out
    again = digits_classifier.load_classifier(tmp_path)
    assert fingerprint(again) == fingerprint(digits_classifier.load_classifier())


def test_features_have_unit_root_mean_square_on_the_training_digits(extractor):
    features = extract_features(extractor, load_digits("train")[0])
    assert features.shape == (1198, extractor.num_features)
    assert float(features.square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_features_clamp_and_do_not_depend_on_the_batch(extractor):
    images = torch.randn(10, 1, 8, 8) * 2
    assert torch.equal(extractor(images), extractor(images.clamp(-1, 1)))
    torch.testing.assert_close(extract_features(extractor, images, 3), extractor(images))


def test_unknown_and_missing_extractors():
    with pytest.raises(UserError, match="digits, inception"):
        load_extractor("vgg")
    with pytest.raises(UserError, match="torch-fidelity"):
        load_extractor("inception")


class Counting:
    name, fingerprint, calls = "counting", "a", 0

    def __call__(self, images):
        self.calls += 1
        return images.flatten(1)[:, :3]


def test_reference_features_are_computed_once(tmp_path):
    counting, images = Counting(), torch.randn(20, 1, 4, 4)
    first = reference.reference_features(images, counting, tmp_path)
    assert torch.equal(reference.reference_features(images, counting, tmp_path), first)
    assert counting.calls == 1
    reference.reference_features(images + 1, counting, tmp_path)
    counting.fingerprint = "b"
    reference.reference_features(images, counting, tmp_path)
    assert counting.calls == 3


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_cache_file_is_made_anew(tmp_path, content):
    counting, images = Counting(), torch.randn(20, 1, 4, 4)
    first = reference.reference_features(images, counting, tmp_path)
    (path,) = (tmp_path / "features").iterdir()
    path.write_bytes(content)
    assert torch.equal(reference.reference_features(images, counting, tmp_path), first)
    assert counting.calls == 2
    reference.reference_features(images, counting, tmp_path)
    assert counting.calls == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "features").write_text("a file where the folder should be")
    images = torch.randn(5, 1, 4, 4)
    assert torch.equal(reference.reference_features(images, Counting(), tmp_path), images.flatten(1)[:, :3])


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path))
    assert reference.cache_directory() == tmp_path
    monkeypatch.delenv("STAGEPATCH_CACHE")
    assert reference.cache_directory().parts[-2:] == (".cache", "stagepatch")


def test_evaluate_tells_real_digits_from_noise(extractor, monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path))
    both = load_references(DataConfig())
    train, held_out = both.train.images, both.held_out.images
    real = evaluate(held_out, References(both.train, None), extractor)
    noise = evaluate(torch.randn(599, 1, 8, 8), both, extractor)
    assert real["fid_train"] < 0.2 < noise["fid_train"]
    assert real["precision"] > 0.8 > noise["precision"]
    assert real["nearest_train"] < noise["nearest_train"]
    assert evaluate(train, both, extractor)["nearest_train"] == pytest.approx(0.0, abs=1e-2)
    assert "fid_held_out" not in real
    assert set(noise) == set(metric_names("digits features"))


def test_features_of_files_are_those_of_the_same_images_in_memory(tmp_path):
    counting, images = Counting(), draw_images(tmp_path / "images", count=5, size=(16, 16), captions=False)
    config = DataConfig(source=str(images), image_size=16)
    dataset = load_dataset(config)
    in_files = reference.features_of(dataset, counting, tmp_path / "cache")
    assert torch.equal(in_files, reference.features_of(in_memory(dataset), counting, tmp_path / "cache"))
    calls = counting.calls
    assert torch.equal(reference.features_of(load_dataset(config), counting, tmp_path / "cache"), in_files)
    assert counting.calls == calls
    draw_images(images, count=1, size=(24, 24), captions=False)
    assert len(reference.features_of(load_dataset(config), counting, tmp_path / "cache")) == 6
    with pytest.raises(UserError, match="metrics need crop 'center'"):
        load_references(DataConfig(source=str(images), crop="buckets"))


def test_fid_is_never_called_plain():
    assert all("(digits features)" in name for key, name in metric_names("digits features").items() if "fid" in key)
