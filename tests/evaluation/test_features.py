"""The bundled classifiers and the extractors."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from torch import nn

from experiments import train_classifiers as training
from stagepatch.checkpoints import module_fingerprint
from stagepatch.core.errors import UserError
from stagepatch.data import load_digits, load_fashion
from stagepatch.evaluation import classifiers, features, fid, load_extractor, recall
from stagepatch.evaluation.features import extract_features

EXTRACTOR = load_extractor("digits")
NAMES = list(classifiers.CLASSIFIERS)
fashion = cache(load_fashion)


@pytest.mark.parametrize(("name", "least"), [("digits", 0.985), ("fashion", 0.9), ("fashion_vit", 0.86)])
def test_a_bundled_classifier_has_its_recorded_accuracy(name, least):
    recorded = json.loads((classifiers.classifier_directory(name) / "config.json").read_text())["held_out_accuracy"]
    images, labels = load_digits("held_out") if name == "digits" else fashion("tune")
    classifier = classifiers.load_classifier(name)
    with torch.no_grad():
        predicted = torch.cat([classifier(part).argmax(dim=1) for part in images.split(500)])
    assert accuracy_score(labels.numpy(), predicted.numpy()) == pytest.approx(recorded, abs=5e-4)
    assert recorded >= least


@pytest.mark.parametrize("name", NAMES)
def test_training_never_asks_for_what_is_held_out(monkeypatch, name):
    asked = []
    for loader in (load_digits, load_fashion):
        note = lambda split, loader=loader: asked.append(split) or [part[:500] for part in loader(split)]  # noqa: E731
        monkeypatch.setattr(training, loader.__name__, note)
    training.train_classifier(name, steps=3)
    assert asked == ["train"]


def test_the_command_writes_a_classifier_that_loads(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "train_classifier", classifiers.load_classifier)
    monkeypatch.setattr("sys.argv", ["train_classifiers", "digits", "--output_dir", str(tmp_path)])
    training.main()
    assert "accuracy 0.9" in capsys.readouterr().out
    again = classifiers.load_classifier("digits", tmp_path / "digits-classifier")
    assert module_fingerprint(again) == module_fingerprint(classifiers.load_classifier("digits"))


@pytest.mark.parametrize("name", NAMES)
def test_features_have_unit_root_mean_square_on_the_training_images(name):
    images = load_digits("train")[0] if name == "digits" else fashion("train")[0][:5000]
    extractor = load_extractor(name)
    features = extract_features(extractor, images)
    assert features.shape == (len(images), extractor.num_features)
    assert float(features.square().mean()) == pytest.approx(1.0, abs=0.05 if len(images) == 5000 else 1e-3)


def test_the_second_extractor_of_fashion_is_another_architecture():
    kinds = [{type(module) for module in classifiers.load_classifier(name).modules()} for name in NAMES[1:]]
    assert torch.nn.MultiheadAttention in kinds[1] - kinds[0]


def test_features_clamp_and_do_not_depend_on_the_batch():
    images = torch.randn(10, 1, 8, 8) * 2
    assert torch.equal(EXTRACTOR(images), EXTRACTOR(images.clamp(-1, 1)))
    torch.testing.assert_close(extract_features(EXTRACTOR, images, 3), EXTRACTOR(images))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"16×16 pixels, not \[1, 8, 8\].*set extractor to: digits\."):
        load_extractor("fashion")(torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match=r"8×8 pixels, not.*: fashion or fashion_vit"):
        EXTRACTOR(torch.zeros(2, 1, 16, 16))
    with pytest.raises(UserError, match=r"grey images of 8×8.*: inception"):
        EXTRACTOR(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["fashion", "fashion_vit"])
def test_features_of_fashion_tell_images_of_one_split_from_worse_ones(name):
    extractor, (tune, labels) = load_extractor(name), fashion("tune")
    features, reference = (extract_features(extractor, images) for images in (tune[::2], tune[1::2]))
    blurred = torch.nn.functional.avg_pool2d(tune[::2], 3, 1, 1)
    one_class = extract_features(extractor, tune[labels == 0])
    good, worse = fid(features, reference), fid(extract_features(extractor, blurred), reference)
    assert 5 * good < worse
    assert recall(one_class, reference) < recall(features[: len(one_class)], reference) - 0.2


@pytest.mark.parametrize("name", ["inception", "inception_legacy"])
def test_images_are_brought_to_a_size_first(monkeypatch, name):
    """As if they had been saved at that size, as 8 bits."""
    monkeypatch.setattr(features, "load_inception", lambda path: Pooled())
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    resized = [
        np.stack([np.asarray(Image.fromarray(plane.astype("float32")).resize((8, 8), Image.BICUBIC)) for plane in one])
        for one in pixels.numpy()
    ]
    small = torch.from_numpy(np.stack(resized)).clamp(0, 255).round() / 127.5 - 1
    plain, at_8 = load_extractor(name), load_extractor(f"{name}@8")
    torch.testing.assert_close(at_8(images), plain(small))
    assert not torch.allclose(at_8(images), plain(images), atol=1e-3)
    assert torch.equal(at_8(small), plain(small))
    assert plain.fingerprint != at_8.fingerprint
    assert at_8.name == f"{plain.name}, at 8×8"
    for odd in ("inception@", "inception@0", "inception@x", "digits@8"):
        with pytest.raises(UserError, match="No feature extractor is named"):
            load_extractor(odd)


class Pooled(nn.Module):
    """In place of Inception-v3: each 13th of the image's rows, which tells aliasing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        return {"features": pixels[:, :, ::13].mean(dim=(1, 3)) * self.weight}


def test_unknown_and_missing_extractors(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("STAGEPATCH_INCEPTION", raising=False)
    with pytest.raises(UserError, match="digits, fashion, fashion_vit, inception"):
        load_extractor("vgg")
    with pytest.raises(UserError, match=r"none is in.*pytorch-fid.*STAGEPATCH_INCEPTION or inception:/path"):
        load_extractor("inception")
    with pytest.raises(UserError, match="'/nowhere' is no file"):
        load_extractor("inception:/nowhere")
