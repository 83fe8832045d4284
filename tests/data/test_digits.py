import hashlib

import pytest
import torch
from sklearn.datasets import load_digits as load_sklearn_digits

from stagepatch.data import load_digits


@pytest.fixture(scope="module")
def train():
    return load_digits("train")


@pytest.fixture(scope="module")
def held_out():
    return load_digits("held_out")


def rows(images):
    return {image.numpy().tobytes() for image in images}


def test_sizes_shapes_and_types(train, held_out):
    for (images, labels), count in ((train, 1198), (held_out, 599)):
        assert images.shape == (count, 1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64


def test_values_fill_the_range(train, held_out):
    for images, _ in (train, held_out):
        assert (images.min().item(), images.max().item()) == (-1.0, 1.0)


def test_splits_are_disjoint_and_together_everything(train, held_out):
    # No two of the scans are alike, so an image tells its place.
    everything = rows(load_digits("all")[0])
    assert len(everything) == 1797
    assert rows(train[0]).isdisjoint(rows(held_out[0]))
    assert rows(train[0]) | rows(held_out[0]) == everything


def test_each_class_is_held_out_by_a_third(held_out):
    _, labels = load_digits("all")
    expected = labels.bincount() / 3
    assert (held_out[1].bincount() - expected).abs().max() <= 1


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_images_keep_their_labels(split):
    pixels, labels = load_sklearn_digits(return_X_y=True)
    known = {
        (torch.tensor(image).float() / 8 - 1).numpy().tobytes(): label
        for image, label in zip(pixels, labels, strict=True)
    }
    images, chosen = load_digits(split)
    assert [known[image.numpy().tobytes()] for image in images] == chosen.tolist()


def test_split_is_the_same_whatever_the_seeds(held_out):
    torch.manual_seed(123)
    again = load_digits("held_out")
    assert torch.equal(again[0], held_out[0])
    assert torch.equal(again[1], held_out[1])


def test_split_is_the_one_it_always_was(held_out):
    # Patches and base models are published with this split: an image that moves leaks.
    digest = hashlib.sha256(held_out[0].numpy().tobytes()).hexdigest()
    assert digest == "3b472e5abae644527f749d5d48897ef939183ea11572fd20ed0508729852c0a6"
