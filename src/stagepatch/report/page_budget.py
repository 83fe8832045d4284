"""Pictures as data URIs that together are no larger than a page may be."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image

from stagepatch.report.pictures import to_png

_SMALLEST = 64  # pixels of the longer side below which nothing is scaled
_SHOWN = 700  # CSS pixels, that small images are enlarged to, up to _ENLARGED times
_ENLARGED = 5
_PIXELS_PER_INCH = 100  # of a plot on the page


@dataclass
class PageImage:
    """A picture as it stands in a page.

    Args:
        width: CSS pixels that it takes, where there is room.
        is_plot: drawn on paper, so that a dark page dims it.
        is_reduced: no longer every pixel as it was.
    """

    uri: str
    width: int
    is_plot: bool
    is_reduced: bool = False

    @classmethod
    def empty(cls) -> "PageImage":
        """In the place of one, to see how large the page is without."""
        return cls("", 0, False)


def within(size: int, groups: Sequence[Sequence[Figure | Image.Image]]) -> list[list[PageImage]]:
    """Each picture as PNG; those of a group that is above its share of `size` bytes as WebP, scaled alike to fit it.

    A group that needs less than its share leaves the rest to the others.
    """
    pngs = [[to_png(picture) for picture in group] for group in groups]
    left, found = size * 3 // 4, [[] for _ in groups]  # type: int, list[list[PageImage]]
    by_size = sorted((place for place, group in enumerate(pngs) if group), key=lambda place: _total(pngs[place]))
    for done, place in enumerate(by_size):
        share = left // (len(by_size) - done)
        is_reduced = _total(pngs[place]) > share
        files, kind = (_reduce(pngs[place], share), "webp") if is_reduced else (pngs[place], "png")
        left -= _total(files)
        for picture, file in zip(groups[place], files, strict=True):
            uri = f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
            found[place].append(PageImage(uri, _width(picture), isinstance(picture, Figure), is_reduced))
    return found


def _total(files: Sequence[bytes]) -> int:
    return sum(map(len, files))


def _width(picture: Figure | Image.Image) -> int:
    if isinstance(picture, Figure):
        return round(_PIXELS_PER_INCH * picture.get_figwidth())
    return picture.width * min(_ENLARGED, max(1, _SHOWN // picture.width))


def _reduce(pngs: Sequence[bytes], size: int) -> list[bytes]:
    """As WebP, smaller until together they have `size` bytes."""
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    scale = 1.0
    while True:
        files = [_to_webp(image, scale) for image in images]
        if _total(files) <= size or scale * max(map(max, (image.size for image in images))) <= _SMALLEST:
            return files
        scale *= max(0.25, 0.95 * math.sqrt(max(size, 1) / _total(files)))


def _to_webp(image: Image.Image, scale: float) -> bytes:
    buffer = io.BytesIO()
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    (image if size == image.size else image.resize(size)).save(buffer, format="WEBP", quality=88, method=4)
    return buffer.getvalue()
