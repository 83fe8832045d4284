"""Datasets of Hugging Face `datasets`: saved on disk, or from the Hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from stagepatch.core.errors import UserError

_SAVED = (("dataset_info.json", "state.json"), ("dataset_dict.json",))


class HuggingFaceSource:
    """Rows of a dataset.

    Args:
        path: a directory written by `save_to_disk`, or whatever else `datasets.load_dataset` takes.
        split: where there are splits.
        image_column: images, as files' bytes or paths.
        caption_column: strings. '' or, for the name 'text', an absent column: no captions.
        label_column: whole numbers from 0. '' or, for the name 'label', an absent column: all labels are 0.

    Raises:
        UserError: `datasets` is not installed, no such dataset or split, or no such column.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "text",
        label_column: str = "label",
    ) -> None:
        self.path = path
        dataset = _load(path, split)
        self._columns = (image_column, caption_column, label_column)
        self._fingerprint = dataset._fingerprint
        self._images = _image_files(dataset, image_column, path)
        self._captions = _column(dataset, caption_column, "caption", "text", path)
        self._labels = _column(dataset, label_column, "label", "label", path)
        if not len(dataset):
            raise UserError(f"No image in '{path}', split '{split}': it has no rows.")

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        file = self._images[index][self._columns[0]]
        if file is None or (file["bytes"] is None and file["path"] is None):
            raise OSError("the row has no image")
        return Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]))

    def label(self, index: int) -> int:
        if self._labels is None:
            return 0
        label = self._labels[index][self._columns[2]]
        if label is None or label < 0:
            raise UserError(
                f"{self.name(index)} has the label {label}: choose a split that has labels, or data.label_column=''."
            )
        return int(label)

    def caption(self, index: int) -> str:
        return "" if self._captions is None else self._captions[index][self._columns[1]] or ""

    def name(self, index: int) -> str:
        return f"row {index} of '{self.path}'"

    def stamp(self) -> list[str]:
        prefix = ":".join([self._fingerprint, *self._columns])
        return [f"{prefix}:{index}" for index in range(len(self))]


def is_saved_dataset(directory: Path) -> bool:
    """Whether `save_to_disk` of a dataset, or of a dict of them, wrote the directory."""
    return any(all((directory / name).is_file() for name in names) for names in _SAVED)


def _load(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Hugging Face datasets are read by the package datasets: pip install datasets") from error
    try:
        if not is_saved_dataset(Path(path)):
            return datasets.load_dataset(path, split=split)
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        raise UserError(
            f"Cannot load the dataset '{path}', split '{split}' ({type(error).__name__}: {error}): give a directory "
            f"written by save_to_disk, or the name and split of a dataset on the Hub."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"'{path}' has no split '{split}': choose data.split from {', '.join(dataset)}.")
        return dataset[split]
    return dataset


def _image_files(dataset: Any, column: str, path: str) -> Any:
    """The image column alone, as files not decoded."""
    import datasets

    if column not in dataset.features:
        raise _no_column(dataset, column, "image", path)
    try:
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"The column '{column}' of '{path}' holds {dataset.features[column]}, not images: "
            f"choose data.image_column."
        ) from error


def _column(dataset: Any, column: str, kind: str, default: str, path: str) -> Any | None:
    """The caption or label column alone; None for none."""
    if not column or (column == default and column not in dataset.features):
        return None
    if column not in dataset.features:
        raise _no_column(dataset, column, kind, path)
    dtype = str(getattr(dataset.features[column], "dtype", ""))
    allowed = ("string", "large_string") if kind == "caption" else ("int", "uint")
    if not dtype.startswith(allowed):
        expected = "strings" if kind == "caption" else "whole numbers (see class_encode_column)"
        raise UserError(
            f"The column '{column}' of '{path}' holds {dataset.features[column]}, but a {kind} column holds "
            f"{expected}: choose data.{kind}_column, '' for none."
        )
    return dataset.select_columns([column])


def _no_column(dataset: Any, column: str, kind: str, path: str) -> UserError:
    return UserError(
        f"'{path}' has no column '{column}': choose data.{kind}_column from {', '.join(dataset.features)}."
    )
