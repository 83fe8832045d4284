"""The bundled Fashion-MNIST against the files that it was made of, and its splits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import make_fashion
from stagepatch.core import UserError
from stagepatch.data import DataConfig, fashion, load_dataset, load_fashion

PUBLISHED = Path("/usr/share/datasets/fashion-mnist")


def test_splits_have_their_sizes_and_are_apart():
    images = {split: load_fashion(split) for split in ("train", "tune", "held_out")}
    assert {split: len(value[0]) for split, value in images.items()} == {
        "train": 60_000,
        "tune": 5000,
        "held_out": 5000,
    }
    for pixels, labels in images.values():
        assert pixels.shape[1:] == (1, 16, 16)
        assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
        assert set(labels.tolist()) == set(range(10))
    everything = torch.cat([pixels for pixels, _ in images.values()])
    assert len({image.numpy().tobytes() for image in everything}) == 70_000
    assert images["train"][1].bincount().tolist() == [6000] * 10
    counts = {split: images[split][1].bincount() for split in ("tune", "held_out")}
    assert (counts["tune"] + counts["held_out"]).tolist() == [1000] * 10
    assert int((counts["tune"] - 500).abs().max()) < 40


def test_tuning_images_are_of_fashion_alone():
    assert len(load_dataset(DataConfig(source="fashion"), "tune")) == 5000
    with pytest.raises(UserError, match="fashion"):
        load_dataset(DataConfig(source="digits"), "tune")


def test_a_damaged_copy_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "fashion-16.xz"
    damaged.write_bytes(fashion.ASSET.read_bytes()[:-1])
    monkeypatch.setattr(fashion, "ASSET", damaged)
    with pytest.raises(UserError, match="install stagepatch again"):
        load_fashion("train")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_images_are_the_published_ones_made_smaller():
    published = make_fashion._read(PUBLISHED / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = make_fashion._read(PUBLISHED / "t10k-labels-idx1-ubyte.gz", 8)
    for split, first in (("tune", 0), ("held_out", 1)):
        images, own_labels = load_fashion(split)
        assert np.array_equal(own_labels.numpy(), labels[first::2])
        # By torch's own antialiased filter: Pillow rounds and clips between its two passes; the copy has 128 levels.
        whole = torch.from_numpy(published[first::2].copy()).float().unsqueeze(1)[:200]
        small = torch.nn.functional.interpolate(whole, (16, 16), mode="bicubic", antialias=True, align_corners=False)
        pixels = (images[:200] + 1) * 127.5
        assert float((pixels - small.clamp(0, 255)).abs().max()) < 16.0
        assert float((pixels - small.clamp(0, 255)).abs().mean()) < 1.0


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.parametrize(
    ("split", "file", "first", "step"), [("train", "train", 0, 1), ("tune", "t10k", 0, 2), ("held_out", "t10k", 1, 2)]
)
def test_the_copy_is_what_its_script_makes(split, file, first, step):
    images, labels = load_fashion(split)
    published = make_fashion._read(PUBLISHED / f"{file}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[first::step]
    assert np.array_equal(
        labels.numpy(), make_fashion._read(PUBLISHED / f"{file}-labels-idx1-ubyte.gz", 8)[first::step]
    )
    every = slice(None, None, 10)
    made = np.stack([make_fashion._shrink(image) for image in published[every]])
    assert np.array_equal(((images[every, 0] + 1) * 127.5).round().numpy().astype(np.uint8), made)


def test_the_copy_stays_small():
    assert fashion.ASSET.stat().st_size < 10_000_000
    assert importlib.util.find_spec("experiments.make_fashion") is not None
