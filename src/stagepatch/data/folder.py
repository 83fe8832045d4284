"""A folder of images; subfolders, where there are any, are the classes."""

import csv
import json
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from stagepatch.core import UserError, as_user_error

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class FolderSource:
    """Images under a folder, with captions from its metadata.jsonl or else its metadata.csv.

    Args:
        directory: images lie in it or in its subfolders; subfolders in alphabetical order are labels 0, 1, ….
        caption_column: of the metadata, beside 'file_name' (relative to the folder); '' leaves the metadata unread.

    Raises:
        UserError: no such folder, no image in it, or metadata that do not fit it.
    """

    def __init__(self, directory: Path, caption_column: str = "text") -> None:
        if not directory.is_dir():
            raise UserError(f"No image folder at '{directory}': give a folder of images, or 'digits'.")
        paths = (path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.paths = sorted(path for path in paths if path.is_file())
        if not self.paths:
            raise UserError(f"No image in '{directory}': looked for {', '.join(sorted(SUFFIXES))}.")
        folders = sorted({path.parent for path in self.paths})
        classes = {folder: label for label, folder in enumerate(folders)}
        self.labels = [classes[path.parent] for path in self.paths]
        self.names = [path.relative_to(directory).as_posix() for path in self.paths]
        captions = _read_captions(directory, caption_column, set(self.names)) if caption_column else {}
        self.captions = [captions.get(name, "") for name in self.names]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def label(self, index: int) -> int:
        return self.labels[index]

    def caption(self, index: int) -> str:
        return self.captions[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def stamp(self) -> list[str]:
        stats = [path.stat() for path in self.paths]
        return [
            f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{caption}"
            for name, stat, caption in zip(self.names, stats, self.captions, strict=True)
        ]


def _read_captions(directory: Path, column: str, names: set[str]) -> dict[str, str]:
    """Captions by file name."""
    path = next((path for path in (directory / "metadata.jsonl", directory / "metadata.csv") if path.is_file()), None)
    if path is None:
        return {}
    with as_user_error(f"Cannot read '{path}'", OSError, ValueError, csv.Error):
        rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    columns = {key for row in rows for key in row}
    for needed in ("file_name", column) if rows else ():
        if needed not in columns:
            known = ", ".join(sorted(map(str, columns)))
            raise UserError(f"'{path}' has no column '{needed}', but {known}: name the captions' data.caption_column.")
    captions = {}
    for number, row in enumerate(rows, 1):
        name, caption = row.get("file_name"), row.get(column)
        if not isinstance(name, str) or PurePosixPath(name).as_posix() not in names:
            raise UserError(
                f"Row {number} of '{path}' names the file '{name}', which is no image in the folder: "
                f"add the image or remove the row."
            )
        if not isinstance(caption, str | None):
            raise UserError(f"Row {number} of '{path}' has {caption!r} as '{column}': a caption is a string.")
        captions[PurePosixPath(name).as_posix()] = caption or ""
    return captions


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds {type(row).__name__}, not a JSON object")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))
