"""A folder of images; subfolders, where there are any, are the classes."""

import csv
import json
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from PIL import Image

from stagepatch.core import UserError, as_user_error
from stagepatch.data.masks import find_masks
from stagepatch.data.references import find_references
from stagepatch.data.source import Source, as_captions

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"}


class FolderSource(Source):
    """Images under a folder, with captions from the first of these that there is, one or several an image.

    - metadata.jsonl, whose captions are strings or lists of strings, or metadata.csv;
    - captions*.json, as COCO's annotations are: 'images' with 'id' and 'file_name', 'annotations' with 'image_id' and
      'caption'. Images of COCO that are not in the folder are passed over;
    - beside an image, a .txt of its name: a caption a line.

    An image's mask is `NAME-masklabel.png` beside it, or lies in a folder of masks; see `masks`. The pictures that it
    is the edit of are `NAME-source.png`, …, or lie in a folder; see `references`.

    Args:
        directory: images lie in it or in its subfolders; subfolders in alphabetical order are labels 0, 1, ….
        caption_column: of the metadata, beside 'file_name' (relative to the folder); '' leaves all captions unread.
        masks: folder of masks, by the images' paths; '' for masks beside images.
        references: folder of pictures that the images are edits of, likewise.

    Raises:
        UserError: no such folder, no image in it, or metadata, masks or references that do not fit it.
    """

    noun: ClassVar[str] = "image"
    suffixes: ClassVar[set[str]] = IMAGES

    def __init__(self, directory: Path, caption_column: str = "text", masks: str = "", references: str = "") -> None:
        if not directory.is_dir():
            raise UserError(f"No {self.noun} folder at '{directory}': give a folder of {self.noun}s.")
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        shown = [path for path in files if path.suffix.lower() in self.suffixes]
        shown, self._masks = find_masks(directory, shown, Path(masks) if masks else None)
        self.paths, self._references = find_references(directory, shown, Path(references) if references else None)
        if not self.paths:
            looked_for = ", ".join(sorted(self.suffixes))
            has_videos = any(path.suffix.lower() in VIDEOS for path in files)
            way_out = " It has videos: data.num_frames above 1 takes these." if has_videos else ""
            raise UserError(f"No {self.noun} in '{directory}': looked for {looked_for}.{way_out}")
        folders = sorted({path.parent for path in self.paths})
        classes = {folder: label for label, folder in enumerate(folders)}
        self.labels = [classes[path.parent] for path in self.paths]
        self._class_names = [path.relative_to(directory).as_posix() for path in folders if folders != [directory]]
        self.names = [path.relative_to(directory).as_posix() for path in self.paths]
        captions = _read_captions(directory, caption_column, self.names) if caption_column else {}
        self._captions = [captions.get(name, [""]) for name in self.names]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def label(self, index: int) -> int:
        return self.labels[index]

    def captions(self, index: int) -> list[str]:
        return self._captions[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def key(self, index: int) -> str:
        return self.names[index]

    def stamp(self) -> list[str]:
        stats = [path.stat() for path in self.paths]
        stamps = [
            f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{captions[0] if len(captions) == 1 else json.dumps(captions)}"
            for name, stat, captions in zip(self.names, stats, self._captions, strict=True)
        ]
        for index, path in enumerate(self.paths):
            if path in self._masks:
                stat = self._masks[path].stat()
                stamps[index] += f":mask:{stat.st_size}:{stat.st_mtime_ns}"
            for stat in (reference.stat() for reference in self.references(index)):
                stamps[index] += f":reference:{stat.st_size}:{stat.st_mtime_ns}"
        return stamps

    @property
    def class_names(self) -> list[str]:
        return self._class_names

    def mask(self, index: int) -> Path | None:
        return self._masks.get(self.paths[index])

    @property
    def has_masks(self) -> bool:
        return bool(self._masks)

    def references(self, index: int) -> list[Path]:
        return self._references.get(self.paths[index], [])


def _read_captions(directory: Path, column: str, names: list[str]) -> dict[str, list[str]]:
    """Captions by file name."""
    for path in (directory / "metadata.jsonl", directory / "metadata.csv"):
        if path.is_file():
            return _read_metadata(path, column, set(names))
    if annotations := sorted(directory.glob("captions*.json")):
        return _read_coco(annotations, names)
    return _read_lines(directory, names)


def _read_coco(paths: list[Path], names: list[str]) -> dict[str, list[str]]:
    """Of annotations in COCO's form: an image is known by its path in the folder, or by its file's name alone."""
    found: dict[str, list[str]] = {}
    for path in paths:
        with as_user_error(
            f"'{path}' is no file of captions in COCO's form", OSError, ValueError, LookupError, TypeError
        ):
            content = json.loads(path.read_text(encoding="utf-8"))
            files = {image["id"]: str(image["file_name"]) for image in content["images"]}
            for annotation in content["annotations"]:
                found.setdefault(files[annotation["image_id"]], []).extend(as_captions(annotation["caption"]))
    own = {name: found.get(name) or found.get(PurePosixPath(name).name) for name in names}
    captions = {name: said for name, said in own.items() if said}
    if not captions:
        raise UserError(
            f"'{paths[0]}' has captions of no image in its folder: of '{next(iter(found), 'none')}', while the folder "
            f"has '{names[0]}'. Put the images there by these names, or set data.caption_column='' for no captions."
        )
    return captions


def _read_lines(directory: Path, names: list[str]) -> dict[str, list[str]]:
    """Of a text file beside each image."""
    texts = set(directory.rglob("*.txt"))
    captions = {}
    for name in names:
        path = (directory / name).with_suffix(".txt")
        if path in texts:
            with as_user_error(f"'{path}' is not UTF-8 text", OSError, UnicodeDecodeError):
                lines = path.read_text(encoding="utf-8").splitlines()
            captions[name] = [line.strip() for line in lines if line.strip()] or [""]
    return captions


def _read_metadata(path: Path, column: str, names: set[str]) -> dict[str, list[str]]:
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
                f"Row {number} of '{path}' names the file '{name}', which is not among those that are read: "
                f"add the file or remove the row."
            )
        with as_user_error(f"Row {number} of '{path}' has {caption!r} as '{column}'", ValueError):
            captions[PurePosixPath(name).as_posix()] = as_captions(caption)
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
