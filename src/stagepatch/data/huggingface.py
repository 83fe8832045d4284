"""Datasets of Hugging Face `datasets`: saved on disk, Parquet files, or from the Hub."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from stagepatch.checkpoints import note_commit, split_revision
from stagepatch.core import UserError, as_user_error
from stagepatch.data.config import DataConfig
from stagepatch.data.source import Source, as_captions

_SAVED = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
# By kind of column: the name that may be absent, what its dtype begins with, and what it holds, in words.
_COLUMNS = {
    "image": (None, (), "images"),
    "caption": ("text", ("string", "large_string"), "strings or lists of them"),
    "label": ("label", ("int", "uint"), "whole numbers (see class_encode_column)"),
}


class HuggingFaceSource(Source):
    """Rows of a dataset.

    Args:
        config: its source is a directory written by `save_to_disk`, a .parquet file, or whatever else
            `datasets.load_dataset` takes; split, where there are splits; image_column: images, as files' bytes or
            paths; caption_column: strings, or lists of them, where '' or, for the name 'text', an absent column means
            no captions; label_column: whole numbers from 0, where '' or, for the name 'label', an absent column means
            that all labels are 0.

    Raises:
        UserError: `datasets` is not installed, no such dataset or split, or no such column.
    """

    def __init__(self, config: DataConfig) -> None:
        self.path = config.source
        self._names = (config.image_column, config.caption_column, config.label_column)
        dataset = _load(self.path, config.split)
        # The library documents it and has no other name for it; caches that exist go by it.
        self._fingerprint = dataset._fingerprint
        # Each alone, so that to read a label is not to read an image.
        self._images, self._captions, self._labels = (
            _column(dataset, kind, name, self.path) for kind, name in zip(_COLUMNS, self._names, strict=True)
        )
        if not len(dataset):
            raise UserError(f"No image in '{self.path}', split '{config.split}': it has no rows.")

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        file = self._images[index][self._names[0]]
        if file is None or (file["bytes"] is None and file["path"] is None):
            raise OSError("the row has no image")
        return Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]))

    def label(self, index: int) -> int:
        if self._labels is None:
            return 0
        label = self._labels[index][self._names[2]]
        if label is None or label < 0:
            raise UserError(
                f"{self.name(index)} has the label {label}: choose a split that has labels, or data.label_column=''."
            )
        return int(label)

    def captions(self, index: int) -> list[str]:
        value = None if self._captions is None else self._captions[index][self._names[1]]
        with as_user_error(f"The caption of {self.name(index)} is {value!r}", ValueError):
            return as_captions(value)

    def name(self, index: int) -> str:
        return f"row {index} of '{self.path}'"

    def key(self, index: int) -> str:
        return str(index)

    @property
    def class_names(self) -> list[str]:
        feature = None if self._labels is None else self._labels.features[self._names[2]]
        return list(getattr(feature, "names", None) or [])

    def stamp(self) -> list[str]:
        prefix = ":".join([self._fingerprint, *self._names])
        return [f"{prefix}:{index}" for index in range(len(self))]


def is_saved_dataset(directory: Path) -> bool:
    """Whether `save_to_disk` of a dataset, or of a dict of them, wrote the directory."""
    return any(all((directory / name).is_file() for name in names) for names in _SAVED)


def is_parquet(path: Path) -> bool:
    """Whether it is a .parquet file."""
    return path.suffix == ".parquet" and path.is_file()


def _load(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Hugging Face datasets are read by the package datasets: pip install datasets") from error
    try:
        if is_parquet(Path(path)):
            return datasets.load_dataset("parquet", data_files=path, split=split)
        if not is_saved_dataset(Path(path)):
            return _from_hub(path, split)
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        raise UserError(
            f"Cannot load the dataset '{path}', split '{split}' ({type(error).__name__}: {error}): give a directory "
            f"written by save_to_disk, a .parquet file, or the name and split of a dataset on the Hub."
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"'{path}' has no split '{split}': choose data.split from {', '.join(dataset)}.")
        return dataset[split]
    return dataset


def _from_hub(source: str, split: str) -> Any:
    import datasets

    name, revision = split_revision(source)
    dataset = datasets.load_dataset(name, split=split, **({"revision": revision} if revision else {}))
    # Where its files were fetched from: 'hf://datasets/name@commit/file'.
    for file in getattr(getattr(dataset, "info", None), "download_checksums", None) or {}:
        if file.startswith(f"hf://datasets/{name}@"):
            note_commit(source, file.removeprefix(f"hf://datasets/{name}@").partition("/")[0])
    return dataset


def _column(dataset: Any, kind: str, column: str, path: str) -> Any:
    """One column alone, images as files not decoded; None for none."""
    import datasets

    may_be_absent, dtypes, expected = _COLUMNS[kind]
    if may_be_absent and (not column or (column == may_be_absent and column not in dataset.features)):
        return None
    if column not in dataset.features:
        raise UserError(
            f"'{path}' has no column '{column}': choose data.{kind}_column from {', '.join(dataset.features)}."
        )
    feature, selected = dataset.features[column], dataset.select_columns([column])
    try:
        if kind == "image":
            return selected.cast_column(column, datasets.Image(decode=False))
        if kind == "caption" and isinstance(feature, list):
            feature = feature[0]
        elif kind == "caption":
            feature = getattr(feature, "feature", feature)  # of a list, what it holds
        if str(getattr(feature, "dtype", "")).startswith(dtypes):
            return selected
    except (TypeError, ValueError, NotImplementedError):
        pass
    way_out = f"data.{kind}_column" + (", '' for none" if may_be_absent else "")
    raise UserError(f"The column '{column}' of '{path}' holds {feature}, not {expected}: choose {way_out}.")
