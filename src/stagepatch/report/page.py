"""One HTML page with everything in it: no script, no font, no picture comes from elsewhere."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from stagepatch.core import write_text
from stagepatch.report.page_budget import PageImage, within
from stagepatch.report.pictures import paired_grids
from stagepatch.report.tables import as_number
from stagepatch.report.versions import environment

PAGE_BYTES = 5_000_000
_WIDE = 960  # pixels, about as many as a page's column
_FILTERED = 8  # a table of more rows has a field to filter it
_WIDE_TABLE = 8  # of more columns
_BLANK = re.compile(r"\W*(nan|inf)?", re.IGNORECASE)


@dataclass
class Table:
    """Columns and rows of text, sorted by a click on a column's name, with a note below.

    A column is sorted as numbers where all its cells begin with one (`as_number`), but for those that are empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def is_filtered(self) -> bool:
        """Whether it is long enough for a field to filter it by."""
        return len(self.rows) > _FILTERED

    @property
    def is_wide(self) -> bool:
        """Whether paper has to be turned for it."""
        return len(self.columns) > _WIDE_TABLE

    @property
    def numbers(self) -> list[list[float | None]]:
        """What each cell is sorted by, None in columns of text and for cells that are empty."""
        found = [[as_number(cell) for cell in row] for row in self.rows]
        for column in range(len(self.columns)):
            cells = [(row[column], numbers[column]) for row, numbers in zip(self.rows, found, strict=True)]
            if any(number is None and not _BLANK.fullmatch(cell) for cell, number in cells):
                for numbers in found:
                    numbers[column] = None
        return found

    @property
    def numeric(self) -> list[bool]:
        """Which columns are of numbers."""
        return [any(number is not None for number in column) for column in zip(*self.numbers, strict=True)]


@dataclass
class Picture:
    """A plot or an image; the caption is also its text for those who cannot see it."""

    title: str
    content: Figure | Image.Image
    caption: str


@dataclass
class Comparison:
    """Two images of one size, one over the other, with a slider between; on paper, and without a script, side by side.

    Args:
        before: what is seen left of the slider.
        after: what is seen right of it.
        labels: what they are.
    """

    title: str
    before: Image.Image
    after: Image.Image
    labels: tuple[str, str]
    caption: str

    @classmethod
    def of_samples(
        cls, title: str, before: Tensor, after: Tensor, labels: tuple[str, str], caption: str
    ) -> "Comparison":
        """Of images [B, C, H, W] from the same noise: the first of them, as many as a page shows well."""
        columns = _columns(before.shape[-1])
        shown = min(len(before), len(after), samples_shown(before.shape[-1]))
        grids = paired_grids(before[:shown], after[:shown], min(columns, shown))
        for grid in grids:
            grid.thumbnail((2 * _WIDE, 2 * _WIDE))
        return cls(title, *grids, labels, caption)


def samples_shown(width: int) -> int:
    """How many samples so many pixels wide a `Comparison` shows at most."""
    return _columns(width) * (4 if _columns(width) == 10 else 2)


def _columns(width: int) -> int:
    return min(10, max(4, _WIDE // width))


@dataclass
class Code:
    """Preformatted text."""

    title: str
    text: str


@dataclass
class Prose:
    """A paragraph."""

    title: str
    text: str


@dataclass
class KeyValues:
    """Names and values."""

    title: str
    mapping: Mapping[str, str]


Section = Table | Picture | Comparison | Code | Prose | KeyValues


def provenance(config: str, commands: str) -> list[Section]:
    """How a result came about: the config, where it was run, and the commands that give it again."""
    return [Code("Config", config), KeyValues("Environment", environment()), Code("Again", commands)]


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section], refresh: int = 0) -> None:
    """Write the page, whole or not at all.

    Pictures that would make it larger than 5 MB are compressed and scaled down; the page then says so.

    Args:
        refresh: seconds after which a browser reads it again; 0 for a page that stays as it is.
    """
    templates = Environment(
        loader=PackageLoader("stagepatch.report", "."), autoescape=select_autoescape(), trim_blocks=True
    )
    script = Path(__file__).with_name("page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts = {"title": title, "lead": lead, "refresh": refresh, "script": Markup(script), "digest": digest}
    facts["limit"] = PAGE_BYTES // 1_000_000

    def render(images: Sequence[Sequence[PageImage]]) -> str:
        shown = [(type(one).__name__, one, own) for one, own in zip(sections, images, strict=True)]
        reduced = sum(image.is_reduced for own in images for image in own)
        return templates.get_template("page.html").render(facts, sections=shown, reduced=reduced)

    pictures = [_pictures(section) for section in sections]
    text = render([[PageImage.empty()] * len(own) for own in pictures])
    write_text(path, render(within(PAGE_BYTES - len(text.encode()), pictures)))


def _pictures(section: Section) -> list[Figure | Image.Image]:
    if isinstance(section, Comparison):
        return [section.before, section.after]
    return [section.content] if isinstance(section, Picture) else []
