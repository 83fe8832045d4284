"""Small images as arrays: NumPy's `.npz` and `.npy`, and the IDX files that MNIST and its like are published as."""

import gzip
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stagepatch.core import UserError, as_user_error
from stagepatch.data.config import DataConfig
from stagepatch.data.source import Source

_IDX = re.compile(r"idx(\d)-ubyte(\.gz)?$")
_LAYOUTS = "[N, H, W], [N, H, W, C] or [N, C, H, W] of uint8, with 1 or 3 channels"


class ArraySource(Source):
    """Images of an array of uint8, [N, H, W], [N, H, W, C] or [N, C, H, W], with 1 or 3 channels; no captions.

    Args:
        config: its source is one of
            - `.npz`: the array named image_column, or else the only one of that form; labels are the array named
              label_column, or else the only one of N whole numbers;
            - `.npy`: labels are in the file beside it that has 'labels' in its name in place of 'images';
            - IDX, packed by gzip or not: labels beside it, as published, `…-labels-idx1-ubyte` of
              `…-images-idx3-ubyte`.
            Nothing of a file is unpickled. label_column '' leaves all labels unread.

    Raises:
        UserError: no such file, or no such array in it; labels that are negative or not as many as images.
    """

    def __init__(self, config: DataConfig) -> None:
        self.path = Path(config.source)
        self.files = [self.path]
        if self.path.suffix == ".npz":
            self.images, labels = _from_npz(self.path, config)
        else:
            self.images, labels = _read(self.path), None
            beside = _labels_beside(self.path)
            if config.label_column and beside is not None:
                self.files.append(beside)
                labels = _read(beside)
        self.images = _channels_last(self.images, self.path)
        self.labels = np.zeros(len(self.images), np.int64) if labels is None else _as_labels(labels)
        if len(self.labels) != len(self.images) or not len(self.images) or self.labels.min() < 0:
            raise UserError(
                f"'{self.path}' has {len(self.images)} images, and {len(self.labels)} labels: each image has one, a "
                f"whole number from 0; data.label_column='' leaves labels unread."
            )

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.images[index]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def captions(self, index: int) -> list[str]:
        return [""]

    def name(self, index: int) -> str:
        return f"image {index} of '{self.path}'"

    def key(self, index: int) -> str:
        return str(index)

    def stamp(self) -> list[str]:
        stats = [(path, path.stat()) for path in self.files]
        prefix = ":".join(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)
        return [f"{prefix}:{index}" for index in range(len(self))]


def is_array(path: Path) -> bool:
    """Whether a file is one of those that `ArraySource` reads, by its name."""
    return path.is_file() and (path.suffix in (".npz", ".npy") or _IDX.search(path.name) is not None)


def _from_npz(path: Path, config: DataConfig) -> tuple[Any, Any]:
    with as_user_error(f"Cannot read '{path}'", Exception), np.load(path, allow_pickle=False) as file:
        arrays = {name: array for name in file.files if isinstance(array := file[name], np.ndarray)}
    images = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim in (3, 4)}
    name = _choose(path, "image", config.image_column, arrays, images)
    if name is None:
        raise UserError(f"'{path}' has no array of images, {_LAYOUTS}, but {_named(arrays)}.")
    if not config.label_column:
        return arrays[name], None
    labels = {
        other: array
        for other, array in arrays.items()
        if array.dtype.kind in "iu" and array.ndim and array.size == len(array) == len(arrays[name])
    }
    found = _choose(path, "label", config.label_column, arrays, labels)
    return arrays[name], None if found is None else arrays[found]


def _choose(path: Path, kind: str, column: str, arrays: dict[str, Any], fitting: dict[str, Any]) -> str | None:
    """The array of that name, or the only one that fits; None where none does."""
    if column in arrays or column != kind:
        if column not in arrays:
            raise UserError(
                f"'{path}' has no array '{column}', but {_named(arrays)}: choose data.{kind}_column from these."
            )
        return column
    if len(fitting) > 1:
        raise UserError(
            f"'{path}' has several arrays of {kind}s: choose data.{kind}_column from {', '.join(fitting)}."
        )
    return next(iter(fitting), None)


def _named(arrays: dict[str, Any]) -> str:
    return ", ".join(f"'{name}' {list(array.shape)} of {array.dtype}" for name, array in arrays.items()) or "nothing"


def _read(path: Path) -> Any:
    """An array of a .npy or an IDX file; what a broken header raises depends on where it breaks."""
    with as_user_error(f"Cannot read '{path}'", Exception):
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        # Two bytes of zeros, one of the type (8: unsigned bytes), one of the number of dimensions, then these.
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an IDX file of unsigned bytes does")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
        if len(content) != 4 + 4 * len(shape) + math.prod(shape):
            raise ValueError(f"it is cut short: {len(content):,} bytes are not an array of {shape}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _labels_beside(path: Path) -> Path | None:
    name = _IDX.sub(r"idx1-ubyte\2", path.name).replace("images", "labels")
    beside = path.with_name(name)
    return beside if name != path.name and beside.is_file() else None


def _channels_last(images: Any, path: Path) -> Any:
    """[N, H, W] for one channel, [N, H, W, 3] for three."""
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        if images.ndim == 4 and images.shape[3] not in (1, 3):
            images = images.transpose(0, 2, 3, 1)
        if images.ndim == 3 or images.shape[3] == 3:
            return images
        if images.shape[3] == 1:
            return images[..., 0]
    raise UserError(f"'{path}' holds {list(images.shape)} of {images.dtype}: images are {_LAYOUTS}.")


def _as_labels(labels: Any) -> Any:
    return np.asarray(labels).reshape(-1).astype(np.int64)
