"""A cache as a dataset: latents and captions, mapped from its files as they are asked for."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from stagepatch.core import UserError, as_user_error, read_tensors
from stagepatch.data.cache_writer import CAPTIONS_PER_FILE, INDEX_NAME, indices_by_size

_OPEN_FILES = 128


class CachedLatents(Dataset[dict[str, Any]]):
    """Items as `training.draws.draw` takes them: mean, standard deviation, label, the caption's condition, and a mask.

    Where images are edits, the latents of their "references" too [R, C, h, w]; and where captions are read together
    with these, the "null_condition" of the empty caption with them.

    Args:
        directory: of a whole cache.

    Attributes:
        lengths: rows of each tensor of a caption's condition; empty where the model takes no captions.
        null_condition: condition of the empty caption; None where the model takes no captions.
        caption_counts: captions of each item, [N]; None where none has more than one.

    Raises:
        UserError: no cache there, or one whose making was stopped.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / INDEX_NAME).exists():
            raise UserError(f"No whole cache at '{directory}': make it, or finish it, with stagepatch cache.")
        self.index, metadata = read_tensors(directory / INDEX_NAME)
        self._open: dict[str, Any] = {}
        with self._as_broken():
            self.pad_to(dict(json.loads(metadata["lengths"])))
            self.caption_counts: Tensor | None = self.index.get("caption_count") if self.lengths else None
            if self.caption_counts is not None:
                self._first_captions = self.caption_counts.cumsum(0) - self.caption_counts
            if any(len(self.index[name]) != len(self) for name in ("row", "label", "size")):
                raise ValueError("its index has tensors of several lengths")

    def __len__(self) -> int:
        return len(self.index["file"])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """An item by its number, with its first caption; or by that and the number of one of its captions."""
        index, caption = index if isinstance(index, tuple) else (index, 0)
        index = range(len(self))[index]
        with self._as_broken():
            return self._item(index, caption)

    def _item(self, index: int, caption: int) -> dict[str, Any]:
        latents = self._file("latents", int(self.index["file"][index]))
        row = int(self.index["row"][index])
        item: dict[str, Any] = {
            name.replace("mean", "image"): latents.get_slice(name)[row]
            for name in latents.keys()  # noqa: SIM118 (it is no dict)
        }
        item["label"] = int(self.index["label"][index])
        if self.lengths:
            item["condition"] = self._condition(self._caption_of(index, caption))
            if "null_caption" in self.index:
                item["null_condition"] = self._condition(int(self.index["null_caption"][index]))
        return item

    def _as_broken(self) -> AbstractContextManager[None]:
        what = f"The cache at '{self.directory}' is broken; delete it and run stagepatch cache again"
        return as_user_error(what, LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError)

    def pad_to(self, lengths: dict[str, int]) -> None:
        """Give conditions so many rows, by name; at first they have as many as the cache's longest caption."""
        self.lengths = lengths
        self.null_condition = self._condition(0) if lengths else None

    def labels(self) -> list[int]:
        """The class of each item."""
        labels: list[int] = self.index["label"].tolist()
        return labels

    def sizes(self) -> list[tuple[int, ...]]:
        """(height, width) [pixels] of each item's image."""
        return [tuple(size) for size in self.index["size"].tolist()]

    def groups(self) -> list[list[int]]:
        """Indices of items with images of one size each."""
        return indices_by_size(self.sizes())

    def keys(self) -> list[int]:
        """A number for each item that follows from its key alone; see `key_of`.

        Raises:
            UserError: the cache is older than keys are.
        """
        if "key" not in self.index:
            raise UserError(
                f"The cache at '{self.directory}' does not know which images are held out: delete its '{INDEX_NAME}', "
                f"and the same command makes it anew, without encoding anything again."
            )
        keys: list[int] = self.index["key"].tolist()
        return keys

    def _caption_of(self, index: int, number: int) -> int:
        if self.caption_counts is None:
            return int(self.index["caption"][index])
        return int(self.index["captions"][self._first_captions[index] + number])

    def _condition(self, caption: int) -> dict[str, Tensor]:
        file = self._file("captions", caption // CAPTIONS_PER_FILE)
        row = caption % CAPTIONS_PER_FILE
        return {name: self._padded(file.get_tensor(f"{row}.{name}"), name) for name in self.lengths}

    def _padded(self, value: Tensor, name: str) -> Tensor:
        """In float32, with zeros to the length of the longest caption, which masks tell from tokens."""
        value = value.float() if value.is_floating_point() else value
        missing = self.lengths[name] - len(value)
        return F.pad(value, (*[0, 0] * (value.ndim - 1), 0, missing)) if missing else value

    def _file(self, kind: str, number: int) -> Any:
        name = f"{kind}-{number:05d}.safetensors"
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            try:
                self._open[name] = safe_open(self.directory / name, framework="pt")
            except Exception as error:  # safetensors raises its own kind, and OSError
                raise UserError(
                    f"The cache's file '{self.directory / name}' cannot be read ({error}): delete it and "
                    f"'{INDEX_NAME}', and run stagepatch cache again."
                ) from error
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        # Files are opened anew in each loading process.
        return {**self.__dict__, "_open": {}}
