"""Images of one size, decoded once: a step takes them from memory, not from files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.core import processes, progress_bar
from stagepatch.data.config import DataConfig
from stagepatch.data.images import Images

_GIB = 2**30


@dataclass(eq=False)
class Pixels(Dataset[dict[str, Any]]):
    """Images as bytes; items are as those of `Images`, but for captions.

    Args:
        images: uint8, [N, C, H, W].
        classes: [N].
        item_keys: N of them.
        masks: uint8, [N, 1, H, W], where there are any.
    """

    images: Tensor
    classes: Tensor
    item_keys: list[int]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"image": self.images[index].float() / 127.5 - 1.0, "label": self.classes[index]}
        return item if self.masks is None else item | {"mask": self.masks[index].float() / 255.0}

    def labels(self) -> list[int]:
        """The class of each item."""
        labels: list[int] = self.classes.tolist()
        return labels

    def keys(self) -> list[int]:
        """A number for each item that follows from its key alone; see `key_of`."""
        return self.item_keys

    def sizes(self) -> list[tuple[int, ...]]:
        """(height, width) [pixels] of each item."""
        return [tuple(self.images.shape[2:])] * len(self)


def decode_once(datasets: Sequence[Images]) -> Sequence[Images | Pixels]:
    """Data sets of one config, decoded; those that would take more memory than it allows as they are, in files."""
    config = datasets[0].config
    size = sum(len(images) * ((config.channels or 3) + images.source.has_masks) for images in datasets)
    if config.crop != "center" or size * config.image_size**2 > config.in_memory * _GIB:
        return datasets
    return [_decode(images, config) for images in datasets]


def _decode(images: Images, config: DataConfig) -> Pixels:
    shape = (len(images), config.channels or 3, config.image_size, config.image_size)
    pixels = torch.empty(shape, dtype=torch.uint8)
    classes = torch.empty(len(images), dtype=torch.long)
    masks = torch.empty_like(pixels[:, :1]) if images.source.has_masks else None
    with progress_bar(disable=not processes().is_main_process) as progress:
        task = progress.add_task("reading images", total=len(images), status="")
        for index in range(len(images)):
            # Back to the byte that it was: (byte / 127.5 − 1) is exact to far below half of one.
            item = images[index]
            pixels[index] = ((item["image"] + 1.0) * 127.5).round().byte()
            classes[index] = item["label"]  # of the image that is shown, in place of a broken one too
            if masks is not None:
                masks[index] = (item["mask"] * 255.0).round().byte()
            progress.advance(task)
    return Pixels(pixels, classes, images.keys(), masks)
