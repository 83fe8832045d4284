"""Images of any source, as tensors of a chosen size; those that cannot be read are left out."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.core import UserError
from stagepatch.data import preprocess
from stagepatch.data.config import IMAGE_SIZE, DataConfig
from stagepatch.data.masks import check_mask, open_mask
from stagepatch.data.references import check_reference, open_reference
from stagepatch.data.source import BROKEN, Source, key_of
from stagepatch.data.tags import check_tags, tag_variants

_LOGGER = logging.getLogger("stagepatch")
_NAMED = 3


class Images(Dataset[dict[str, Any]]):
    """Items {"image": [C, H, W] in [−1, 1], "label": int, "caption": str}, of several captions the first.

    Where any image has a mask, all have a "mask" [1, H, W] from 0 to 1, cropped as the image; those without, ones.
    Where images are edits of pictures, these are "references" [R, C, H, W], each cropped to the image's own size.

    Every header is read once, at the start; what is broken is named in one warning and left out. An image whose
    pixels turn out to be broken is replaced, at its own size, by the next good one, with a warning of its own.

    Args:
        source: where the images come from.
        config: their size, crop, channels, and how many may be broken.

    Raises:
        UserError: more than `config.max_broken` images are broken (at the start, or once an item shows it), none is
            left, or the config does not make sense.
    """

    noun: ClassVar[str] = "image"

    def __init__(self, source: Source, config: DataConfig) -> None:
        if config.channels not in (0, 1, 3):
            raise UserError(f"data.channels={config.channels} must be 1 (grey) or 3 (colour).")
        config = replace(config, image_size=config.image_size or IMAGE_SIZE)
        check_tags(config.tags)
        self.source = source
        self.config = config
        self._buckets = [(config.image_size, config.image_size)]
        if config.crop == "buckets":
            self._buckets = preprocess.bucket_sizes(config.image_size, config.bucket_step)
        self._indices: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._broken: list[str] = []
        self._read_headers()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        for candidate in chain(range(index, len(self)), range(index)):
            if self._undecodable[candidate]:
                continue
            try:
                return self._item(candidate, self._sizes[index])
            except UserError:
                raise
            except BROKEN as error:
                self._undecodable[candidate] = True
                self._check_count(error)
                broken = self._describe(self._indices[candidate], error)
                _LOGGER.warning("One %s cannot be decoded; the next good one replaces it: %s", self.noun, broken)
        raise self._refusal()

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) [pixels] of each item, known from the headers."""
        return list(self._sizes)

    def stamp(self) -> list[str]:
        """A string for each of the source's images that changes when its file does."""
        return self.source.stamp()

    def labels(self) -> list[int]:
        """The class of each item."""
        return [self.source.label(index) for index in self._indices]

    def captions(self) -> list[list[str]]:
        """The captions of each item, and of each the variants that the config asks for."""
        tags = self.config.tags
        return [
            [variant for caption in self.source.captions(index) for variant in tag_variants(caption, tags)]
            for index in self._indices
        ]

    def keys(self) -> list[int]:
        """A number for each item that follows from its key alone; see `key_of`."""
        return [key_of(self.source.key(index)) for index in self._indices]

    def _item(self, candidate: int, size: tuple[int, int]) -> dict[str, Any]:
        index = self._indices[candidate]
        item: dict[str, Any] = {
            "image": self._pixels(candidate, size),
            "label": self.source.label(index),
            "caption": self.source.captions(index)[0],
        }
        if self.source.has_masks:
            path = self.source.mask(index)
            white = Image.new("L", (size[1], size[0]), 255)
            mask = white if path is None else self._cropped(open_mask(path), size)
            item["mask"] = (preprocess.to_tensor(mask) + 1.0) / 2.0
        if paths := self.source.references(index):
            item["references"] = torch.stack([self._reference(path, candidate, size) for path in paths])
        return item

    def _check_reference(self, path: Path) -> None:
        check_reference(path)

    def _reference(self, path: Path, item: int, size: tuple[int, int]) -> Tensor:
        return preprocess.to_tensor(self._cropped(open_reference(path, self.config.channels or 3), size))

    def _pixels(self, item: int, size: tuple[int, int]) -> Tensor:
        """[C, height, width] of an item."""
        with self.source.load(self._indices[item]) as file:
            image = preprocess.upright(file, self.config.channels or 3)
        return preprocess.to_tensor(self._cropped(image, size))

    def _cropped(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if self.config.crop == "buckets":
            return preprocess.fit_to_bucket(image, size)
        return preprocess.center_crop_adm(image, self.config.image_size)

    def _look_at(self, index: int) -> tuple[tuple[int, int], int]:
        """(height, width) [pixels] of what the source has there, and how many items it makes."""
        with self.source.load(index) as file:
            size = preprocess.upright_size(file)
            file.verify()
        return size, 1

    def _read_headers(self) -> None:
        for index in range(len(self.source)):
            try:
                (height, width), count = self._look_at(index)
            except UserError:
                raise
            except BROKEN as error:
                self._broken.append(self._describe(index, error))
                continue
            if (mask := self.source.mask(index)) is not None:
                check_mask(mask, (height, width))
            for path in self.source.references(index):
                self._check_reference(path)
            self._indices += [index] * count
            self._sizes += [preprocess.nearest_bucket(width, height, self._buckets)] * count
        # In shared memory, so that loading processes count together.
        self._undecodable = torch.zeros(len(self._indices), dtype=torch.bool).share_memory_()
        self._check_count()
        if not self._indices:
            raise self._refusal()
        if self._broken:
            total = f"{len(self._broken)} of {len(self.source)}"
            _LOGGER.warning("%s %ss cannot be read and are left out: %s", total, self.noun, "; ".join(self._broken))

    def _describe(self, index: int, error: BaseException | str) -> str:
        return f"{self.source.name(index)} ({error})"

    def _lost(self) -> list[int]:
        """What the source has whose pixels turned out to be broken."""
        return sorted({self._indices[item] for item in self._undecodable.nonzero().flatten().tolist()})

    def _check_count(self, error: BaseException | None = None) -> None:
        if len(self._broken) + len(self._lost()) > self.config.max_broken:
            raise self._refusal() from error

    def _refusal(self) -> UserError:
        broken = self._broken + [self._describe(index, "cannot be decoded") for index in self._lost()]
        named = "; ".join(broken[:_NAMED]) + ("; …" if len(broken) > _NAMED else "")
        way_out = "repair or remove them"
        if len(broken) < len(self.source):
            way_out += f", or raise data.max_broken={self.config.max_broken}"
        return UserError(f"Cannot read {len(broken)} of {len(self.source)} {self.noun}s: {named}: {way_out}.")
