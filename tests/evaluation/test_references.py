"""The cache of reference features, and what references are made of."""

from functools import cache

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.data import (
    BUNDLED,
    DataConfig,
    ImageDataset,
    in_memory,
    load_dataset,
    load_digits,
    load_fashion,
    load_training_data,
)
from stagepatch.evaluation import Evaluator, load_references, references
from tests.evaluation.extractors import Counting
from tests.training.test_train_on_pipelines import draw_images

IMAGES = ImageDataset(torch.randn(20, 1, 4, 4), torch.zeros(20, dtype=torch.long))


def test_features_are_computed_once(tmp_path):
    counting = Counting()
    first, again = (references.reference_features(IMAGES, counting, tmp_path) for _ in range(2))
    assert torch.equal(again, first)
    assert counting.calls == 1
    references.reference_features(ImageDataset(IMAGES.images + 1, IMAGES.labels), counting, tmp_path)
    counting.fingerprint = "b"
    references.reference_features(IMAGES, counting, tmp_path)
    assert counting.calls == 3


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_cache_file_is_made_anew(tmp_path, content):
    counting = Counting()
    first = references.reference_features(IMAGES, counting, tmp_path)
    (path,) = (tmp_path / "features").glob("*/*")
    path.write_bytes(content)
    for _ in range(2):
        assert torch.equal(references.reference_features(IMAGES, counting, tmp_path), first)
        assert counting.calls == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path):
    (tmp_path / "features").write_text("a file where the folder should be")
    found = references.reference_features(IMAGES, Counting(), tmp_path)
    assert torch.equal(found, IMAGES.images.flatten(1)[:, :3])


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path))
    assert references.feature_cache() == tmp_path
    monkeypatch.delenv("STAGEPATCH_CACHE")
    assert references.feature_cache().parts[-2:] == (".cache", "stagepatch")


def test_features_of_files_are_those_of_the_same_images_in_memory(tmp_path):
    counting, images = Counting(), draw_images(tmp_path / "images", count=5, size=(16, 16), captions=False)
    config = DataConfig(source=str(images), image_size=16)

    def features(dataset):
        return references.reference_features(dataset, counting, tmp_path / "cache")

    in_files = features(load_dataset(config))
    assert torch.equal(in_files, features(in_memory(load_dataset(config))))
    calls = counting.calls
    assert torch.equal(features(load_dataset(config)), in_files)
    assert counting.calls == calls
    draw_images(images, count=1, size=(24, 24), captions=False)
    assert len(features(load_dataset(config))) == 6


def test_images_of_many_sizes_are_no_reference(tmp_path):
    with pytest.raises(UserError, match="metrics need crop 'center'"):
        load_references(DataConfig(source=str(tmp_path), crop="buckets"))


@pytest.mark.parametrize("split", ["held_out", "tune"])
def test_references_of_fashion_are_those_asked_for(monkeypatch, split):
    few = cache(lambda split: tuple(part[:100] for part in load_fashion(split)))
    monkeypatch.setitem(BUNDLED, "fashion", few)
    found = load_references(DataConfig(source="fashion"), split)
    for dataset, name in ((found.train, "train"), (found.held_out, split)):
        assert torch.equal(dataset.images, few(name)[0])
        assert torch.equal(dataset.labels, few(name)[1])


def test_images_to_choose_by_are_of_fashion_alone(tmp_path):
    assert torch.equal(load_references(DataConfig()).held_out.images, load_digits("held_out")[0])
    with pytest.raises(UserError, match=r"'fashion' alone.*'train' and 'held_out'"):
        load_references(DataConfig(), "tune")
    with pytest.raises(UserError, match="not of"):
        load_references(DataConfig(source=str(tmp_path)), "tune")


@pytest.mark.parametrize("is_small", [True, False])
def test_references_of_a_share_are_those_that_training_leaves_out(tmp_path, monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr(references, "_MOST_NUMBERS", 0)
    images = draw_images(tmp_path / "images", count=20, size=(16, 16), captions=False)
    config = DataConfig(source=str(images), image_size=16, held_out=0.3)
    trained, found = load_training_data("", config), load_references(config)
    assert 0 < len(trained.held_out) < 20
    for dataset, expected in ((found.train, trained), (found.held_out, trained.held_out)):
        assert isinstance(dataset, ImageDataset) is is_small
        assert torch.equal(in_memory(dataset).images, in_memory(expected).images)
    evaluator = Evaluator(found, Counting())
    assert evaluator.labels(3).tolist() == [0, 0, 0]
    assert torch.equal(evaluator.reference("held_out"), in_memory(trained.held_out).images.flatten(1)[:, :3])
