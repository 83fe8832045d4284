"""Arrays of small images: .npz, .npy and IDX."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.core import UserError
from stagepatch.data import ArraySource, DataConfig, open_source
from stagepatch.data.dataset import find_format
from tests.data.reading import load, summary

GREY = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 1, 2, 3])


def write_idx(path, array):
    """As LeCun's page describes it: zeros, type, dimensions, sizes from the high byte."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    pack = gzip.compress if path.suffix == ".gz" else bytes
    path.write_bytes(pack(header + array.astype(np.uint8).tobytes()))


def write_pair(directory, ending, write):
    name = "train-images-idx3-ubyte{}" if ending in ("", ".gz") else "train_images{}"
    images = directory / name.format(ending)
    write(images, GREY)
    write(images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1")), LABELS)
    return images


def assert_shows(dataset, images, labels):
    """As PNG files of the same bytes would be."""
    expected = torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0)
    expected = expected.unsqueeze(1) if expected.ndim == 3 else expected.permute(0, 3, 1, 2)
    assert torch.equal(torch.stack([dataset[index]["image"] for index in range(len(dataset))]), expected)
    assert [label for _, label, _ in summary(dataset)] == list(labels)


@pytest.mark.parametrize(("ending", "write"), [("", write_idx), (".gz", write_idx), (".npy", np.save)])
def test_labels_lie_beside_the_images(tmp_path, ending, write):
    images = write_pair(tmp_path, ending, write)
    assert find_format(images) == "arrays"
    assert_shows(load(images), GREY, LABELS)
    assert_shows(load(images, label_column=""), GREY, [0] * 5)
    stamp = open_source(DataConfig(str(images))).stamp()
    write(images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1")), LABELS[::-1])
    changed = open_source(DataConfig(str(images)))
    assert (len(set(stamp)), changed.label(1)) == (5, 2)
    assert not set(stamp) & set(changed.stamp())


@pytest.mark.parametrize(
    ("arrays", "choices", "images", "labels"),
    [
        ({"arr_0": COLOUR, "arr_1": LABELS}, {}, COLOUR, LABELS),  # as ADM's are
        ({"arr_0": COLOUR.transpose(0, 3, 1, 2)}, {}, COLOUR, [0] * 5),
        ({"arr_0": GREY[..., None], "arr_1": LABELS[:, None]}, {"label_column": ""}, GREY, [0] * 5),
        ({"image": GREY, "other": GREY + 1, "label": LABELS, "kind": LABELS}, {}, GREY, LABELS),
        ({"x_train": GREY, "y_train": LABELS, "x_test": GREY[:2]}, {"image_column": "x_train"}, GREY, LABELS),
    ],
)
def test_npz(tmp_path, arrays, choices, images, labels):
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    assert_shows(load(tmp_path / "a.npz", channels=1 if images.ndim == 3 else 3, **choices), images, labels)


@pytest.mark.parametrize(
    ("arrays", "choices", "message"),
    [
        ({"x": GREY, "z": GREY}, {}, "several arrays of images: choose data.image_column from x, z"),
        ({"x": GREY, "a": LABELS, "b": LABELS}, {}, "several arrays of labels: choose data.label_column from a, b"),
        ({"x": GREY}, {"image_column": "y"}, r"no array 'y', but 'x' \[5, 8, 8\] of uint8"),
        ({"x": GREY.astype(np.float32)}, {}, r"no array of images.*but 'x' \[5, 8, 8\] of float32"),
        ({"image": LABELS}, {}, r"holds \[5\] of int64"),
        ({"x": GREY, "label": LABELS[:4]}, {}, "5 images, and 4 labels"),
        ({"x": GREY, "label": -LABELS}, {}, "a whole number from 0"),
        ({"x": GREY[:0]}, {}, "has 0 images"),
    ],
)
def test_npz_that_do_not_fit_are_refused(tmp_path, arrays, choices, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        ArraySource(DataConfig(str(tmp_path / "a.npz"), **choices))


class Evil:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("ending", [".npz", ".npy", "-images-idx3-ubyte", "-images-idx3-ubyte.gz"])
def test_broken_files_and_pickles_are_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    contents = [b"", b"nonsense", pickle.dumps(Evil())]
    if ending.endswith("ubyte"):
        write_idx(path, GREY)
        contents.append(path.read_bytes()[:-1])
    elif ending in (".npz", ".npy"):
        with open(path, "wb") as file:
            (np.savez if ending == ".npz" else np.save)(file, np.array([Evil()], dtype=object), allow_pickle=True)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match="Cannot read"):
            ArraySource(DataConfig(str(path)))


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"image": [Image.fromarray(each) for each in GREY], "label": LABELS.tolist()}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "a.parquet")
    assert_shows(load(tmp_path / "a.parquet"), GREY, LABELS)
    with pytest.raises(UserError, match="Cannot load the dataset"):
        load(tmp_path / "a.parquet", split="test")
