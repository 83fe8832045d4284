"""One HTML page with everything in it: no script, no font, no picture comes from elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from stagepatch.core import write_text
from stagepatch.report.pictures import to_data_uri
from stagepatch.report.versions import environment


@dataclass
class Table:
    """Columns and rows of text, with a note below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Picture:
    """A plot or an image; the caption is also its text for those who cannot see it."""

    title: str
    content: Figure | Image.Image
    caption: str

    @property
    def data_uri(self) -> str:
        """It as a PNG, for the page."""
        return to_data_uri(self.content)


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


Section = Table | Picture | Code | Prose | KeyValues


def provenance(config: str, commands: str) -> list[Section]:
    """How a result came about: the config, where it was run, and the commands that give it again."""
    return [Code("Config", config), KeyValues("Environment", environment()), Code("Again", commands)]


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section], refresh: int = 0) -> None:
    """Write the page, whole or not at all.

    Args:
        refresh: seconds after which a browser reads it again; 0 for a page that stays as it is.
    """
    templates = Environment(
        loader=PackageLoader("stagepatch.report", "."), autoescape=select_autoescape(), trim_blocks=True
    )
    kinds = [(type(section).__name__, section) for section in sections]
    page = templates.get_template("page.html").render(title=title, lead=lead, sections=kinds, refresh=refresh)
    write_text(path, page)
