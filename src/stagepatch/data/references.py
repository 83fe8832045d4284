"""References beside images: the pictures that an editing model is given, of which the image is what it should make.

`NAME-source.png` beside `NAME.png`, then `NAME-source2.png`, `NAME-source3.png`, …; or, one an image, those of the
images' names in a folder of their own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stagepatch.core import UserError, as_user_error
from stagepatch.data.preprocess import upright
from stagepatch.data.source import BROKEN

_BESIDE = re.compile(r"(.+)-source(\d*)")


def find_references(
    directory: Path, files: Sequence[Path], folder: Path | None = None
) -> tuple[list[Path], dict[Path, list[Path]]]:
    """The images among files under a directory, and the references of each, where there are any.

    Args:
        folder: the references lie in it, by the path of their image in the directory; or else beside their images.

    Raises:
        UserError: no reference of any image in the folder, or other numbers of them.
    """
    found: dict[Path, list[Path]]
    if folder is None:
        images, found = _beside(files)
    else:
        paths = {
            path.relative_to(folder).with_suffix(""): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        images = [path for path in files if not path.is_relative_to(folder)]
        named = {path: path.relative_to(directory).with_suffix("") for path in images}
        found = {path: [paths[name]] for path, name in named.items() if name in paths}
        if not found:
            raise UserError(f"No picture in data.references='{folder}' has the name of an image in '{directory}'.")
    most = max(images, key=lambda path: len(found.get(path, [])), default=None)
    count = len(found.get(most, [])) if most else 0
    if fewer := next((path for path in images if len(found.get(path, [])) < count), None):
        raise UserError(
            f"'{most}' is the edit of {count} picture(s), and '{fewer}' of {len(found.get(fewer, []))}: all images "
            f"that are trained on together need as many. Add {fewer.stem}-source.png beside it, or remove it."
        )
    return images, found


def _beside(files: Sequence[Path]) -> tuple[list[Path], dict[Path, list[Path]]]:
    names = {path.with_suffix(""): path for path in files}
    numbered: dict[Path, list[tuple[int, Path]]] = {}
    for path in files:
        if (match := _BESIDE.fullmatch(path.stem)) and (image := names.get(path.parent / match[1])):
            numbered.setdefault(image, []).append((int(match[2] or 1), path))
    found = {image: [path for _, path in sorted(each)] for image, each in numbered.items()}
    references = {path for each in found.values() for path in each}
    return [path for path in files if path not in references], found


def open_reference(path: Path, channels: int) -> Image.Image:
    """A reference as an image in colour (3 channels) or grey (1), decoded.

    Raises:
        UserError: it cannot be read.
    """
    with as_user_error(_broken(path), *BROKEN), Image.open(path) as file:
        return upright(file, channels)


def check_reference(path: Path) -> None:
    """Refuse a reference whose header cannot be read.

    Raises:
        UserError: it cannot.
    """
    with as_user_error(_broken(path), *BROKEN), Image.open(path) as file:
        file.verify()


def _broken(path: Path) -> str:
    return f"Cannot read the picture '{path}', which an image is the edit of"
