"""Small images decoded once."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.core import UserError
from stagepatch.data import DataConfig, Images, Pixels, decode_once, load_training_data
from tests.data.reading import load, picture
from tests.runs import run


@pytest.fixture
def folder(tmp_path):
    """Images of every byte there is, in two classes."""
    for number in range(6):
        directory = tmp_path / "images" / "ab"[number % 2]
        directory.mkdir(parents=True, exist_ok=True)
        pixels = np.roll(np.arange(256, dtype=np.uint8), number).reshape(16, 16)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    return tmp_path / "images"


def test_items_are_bit_for_bit_those_of_the_files_and_files_are_read_once(folder, monkeypatch):
    for choices in ({"image_size": 16}, {"image_size": 8, "channels": 3}):
        images = load(folder, **choices)
        (pixels,) = decode_once([images])
        assert (type(pixels), pixels.images.dtype, len(pixels)) == (Pixels, torch.uint8, 6)
        expected = [images[index] for index in range(6)]
        with monkeypatch.context() as patched:
            patched.setattr(Image, "open", None)
            found = [pixels[index] for index in range(6)]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one["image"], other["image"])
            assert one["label"] == other["label"]
    assert pixels.labels() == [0, 0, 0, 1, 1, 1]


def test_an_image_that_breaks_when_it_is_decoded_is_replaced_with_its_label(folder):
    path = folder / "a" / "9.jpg"
    picture(100, (16, 16)).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    images = load(folder, image_size=16)
    (pixels,) = decode_once([images])
    assert images.labels() == [0, 0, 0, 0, 1, 1, 1]
    assert pixels.labels() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(pixels[3]["image"], pixels[4]["image"])


def test_what_is_too_large_or_of_several_sizes_stays_in_files(folder):
    size = 6 * 16 * 16 / 2**30
    assert isinstance(decode_once([load(folder, image_size=16, in_memory=size)])[0], Pixels)
    for choices in ({"in_memory": 0.99 * size}, {"in_memory": 0.0}, {"crop": "buckets", "bucket_step": 8}):
        assert isinstance(decode_once([load(folder, image_size=16, **choices)])[0], Images)
    with pytest.raises(UserError, match=r"in_memory=-1.0 must be at least 0"):
        load(folder, in_memory=-1.0)


def test_training_takes_them_from_memory_and_ends_the_same(tmp_path, folder):
    config = DataConfig(str(folder), image_size=8, channels=1)
    kept, read = (load_training_data("", DataConfig(**{**vars(config), "in_memory": size})) for size in (1.0, 0.0))
    assert (type(kept), type(read)) == (Pixels, Images)
    run(tmp_path / "kept", dataset=kept, steps=2, flip=True)
    run(tmp_path / "read", dataset=read, steps=2, flip=True)
    assert (tmp_path / "kept/model.safetensors").read_bytes() == (tmp_path / "read/model.safetensors").read_bytes()
