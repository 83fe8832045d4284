"""The digits classifier and the extractors."""

import json

import pytest
import torch

from experiments import train_digits_classifier as training
from stagepatch.checkpoints import module_fingerprint
from stagepatch.core.errors import UserError
from stagepatch.data import load_digits
from stagepatch.evaluation import digits_classifier, load_extractor
from stagepatch.evaluation.features import extract_features

EXTRACTOR = load_extractor("digits")


def test_the_bundled_classifier_has_its_recorded_accuracy():
    recorded = json.loads((digits_classifier.ASSET / "config.json").read_text())["held_out_accuracy"]
    assert training.held_out_accuracy(digits_classifier.load_classifier()) == pytest.approx(recorded, abs=1e-4)
    assert recorded >= 0.985


def test_training_never_asks_for_the_held_out_third(monkeypatch):
    asked = []
    monkeypatch.setattr(training, "load_digits", lambda split: asked.append(split) or load_digits(split))
    training.train_digits_classifier(steps=3)
    assert asked == ["train"]


def test_the_command_writes_a_classifier_that_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "train_digits_classifier", lambda: digits_classifier.load_classifier())
    monkeypatch.setattr("sys.argv", ["digits_classifier", "--output_dir", str(tmp_path)])
    training.main()
    assert "Held-out accuracy 0.9" in capsys.readouterr().out
    again = digits_classifier.load_classifier(tmp_path)
    assert module_fingerprint(again) == module_fingerprint(digits_classifier.load_classifier())


def test_features_have_unit_root_mean_square_on_the_training_digits():
    features = extract_features(EXTRACTOR, load_digits("train")[0])
    assert features.shape == (1198, EXTRACTOR.num_features)
    assert float(features.square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_features_clamp_and_do_not_depend_on_the_batch():
    images = torch.randn(10, 1, 8, 8) * 2
    assert torch.equal(EXTRACTOR(images), EXTRACTOR(images.clamp(-1, 1)))
    torch.testing.assert_close(extract_features(EXTRACTOR, images, 3), EXTRACTOR(images))


def test_unknown_and_missing_extractors():
    with pytest.raises(UserError, match="digits, inception"):
        load_extractor("vgg")
    with pytest.raises(UserError, match="torch-fidelity"):
        load_extractor("inception")
