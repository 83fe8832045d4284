"""Several data sets as one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.core import UserError
from stagepatch.data.cache_dataset import CachedLatents
from stagepatch.data.cache_writer import indices_by_size
from stagepatch.data.config import DataConfig
from stagepatch.data.images import Images
from stagepatch.data.pixels import Pixels
from stagepatch.data.source import Source


class Mixture(Dataset[dict[str, Any]]):
    """The items of all data sets, one set after the other; batches hold items of any that are of one size.

    Args:
        datasets: all of images, or all of caches for one model.
        config: its `sources` say how often an epoch of `groups` shows the items of each.

    Attributes:
        null_condition, caption_counts: as those of `CachedLatents`.
    """

    def __init__(self, datasets: Sequence[Images | Pixels] | Sequence[CachedLatents], config: DataConfig) -> None:
        self.datasets = list[Any](datasets)
        self.config = config
        self._ends = torch.tensor([len(dataset) for dataset in datasets]).cumsum(0).tolist()
        self._has_masks = any("mask" in dataset[0] for dataset in self.datasets)
        cached = [dataset for dataset in datasets if isinstance(dataset, CachedLatents)]
        lengths = [dataset.lengths for dataset in cached]
        for dataset in cached:
            dataset.pad_to({name: max(each[name] for each in lengths) for name in lengths[0]})
        self.null_condition = cached[0].null_condition if cached else None
        self.caption_counts: Tensor | None = None
        if any(dataset.caption_counts is not None for dataset in cached):
            counts = ((dataset.caption_counts, len(dataset)) for dataset in cached)
            parts = [torch.ones(size, dtype=torch.long) if each is None else each for each, size in counts]
            self.caption_counts = torch.cat(parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """An item by its number; or by that and the number of one of its captions."""
        number, *caption = index if isinstance(index, tuple) else (index,)
        place = bisect_right(self._ends, number)
        own = number - (self._ends[place - 1] if place else 0)
        item: dict[str, Any] = self.datasets[place][(own, *caption) if caption else own]
        if self._has_masks and "mask" not in item:
            item["mask"] = torch.ones_like(item["image"][:1])
        return item

    def groups(self) -> list[list[int]]:
        """Indices of items with images of one size each, an index as often as its item is shown in an epoch."""
        sizes = [size for dataset in self.datasets for size in dataset.sizes()]
        sources = zip(self.datasets, self.config.sources, strict=True)
        repeats = [source.repeats for dataset, source in sources for _ in range(len(dataset))]
        return [[index for index in group for _ in range(repeats[index])] for group in indices_by_size(sizes)]

    def labels(self) -> list[int]:
        """The class of each item."""
        return [label for dataset in self.datasets for label in dataset.labels()]

    def keys(self) -> list[int]:
        """A number for each item that follows from its key alone; see `key_of`."""
        return list(chain.from_iterable(dataset.keys() for dataset in self.datasets))

    def stamp(self) -> list[str]:
        """A string for each item that changes when its file does; of images in files."""
        return [stamp for dataset in self.datasets for stamp in dataset.stamp()]


def split_sources(config: DataConfig) -> list[DataConfig]:
    """The config of each data set of several; of one, itself alone."""
    return [
        replace(config, source=each.source, masks=each.masks, references=each.references, sources=[])
        for each in config.sources
    ] or [config]


def check_alike(sources: Sequence[Source], names: Sequence[str]) -> None:
    """Refuse data sets that mean different things by their labels, or of which some have captions and others classes.

    Args:
        names: of the sources, for the message.

    Raises:
        UserError: they do.
    """
    counts = [len(source.references(0)) for source in sources]
    if len({*counts}) > 1:
        listed = ", ".join(f"{count} of '{name}'" for count, name in zip(counts, names, strict=True))
        raise UserError(f"Images of all data sets must be edits of as many pictures, which are {listed}.")
    captioned = [any(any(source.captions(index)) for index in range(len(source))) for source in sources]
    classes = [any(source.label(index) for index in range(len(source))) for source in sources]
    first = {True: "", False: ""}
    for name, has_captions, has_classes in zip(names, captioned, classes, strict=True):
        if has_captions or has_classes:
            first[has_captions] = first[has_captions] or name
    if first[True] and first[False]:
        raise UserError(
            f"'{first[True]}' has captions, but '{first[False]}' has classes and no captions: give it captions, or "
            f"leave all captions unread with data.caption_column=''."
        )
    if first[True] or not first[False]:
        return
    known: dict[int, tuple[str, str]] = {}
    for source, name, has_classes in zip(sources, names, classes, strict=True):
        if not has_classes and not source.class_names:
            raise UserError(
                f"'{first[False]}' has classes, but '{name}' has none, so all of it would be of class 0: put its "
                f"images into the same subfolders, or give it labels."
            )
        for label, class_name in enumerate(source.class_names):
            other, of_other = known.setdefault(label, (class_name, name))
            if other != class_name:
                raise UserError(
                    f"Class {label} of '{of_other}' is '{other}', but of '{name}' it is '{class_name}': give both "
                    f"images of the same classes, in subfolders of the same names."
                )
