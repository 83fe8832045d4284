"""A page with every kind of section, each given what would be a script if it were not text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import torch

from stagepatch import report

EVIL = """"><img src=x onerror="document.title='run'"><script>document.title='run'</script>"""
COLUMNS = ["method", "change [%]", "parameters", "p", "kind"]
ROWS = [
    [f"method {number}", f"{change:+.1f} ± 0.4 %".replace("-", "−"), f"{parameters:,}", p, kind]
    for number, (change, parameters, p, kind) in enumerate(
        [
            (-2.0, 1024, "0.010", "low rank"),
            (10.0, 998, "", "prompts"),
            (-12.5, 20_000, "0.200", "prompts"),
            (1.0, 0, "0.050", "low rank"),
            (0.0, 3, "1e-05", "bias"),
            (9.0, 7, "–", "all"),
            (-1.0, 90, "0.900", "all"),
            (3.0, 5, "0.400", "bias"),
            (4.0, 6, "0.500", "bias"),
            (5.0, 8, "0.600", "bias"),
        ]
    )
]


def write(path: Path, evil: str = EVIL) -> None:
    """Three tables, a plot, an image, a slider, and the rest."""
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    black, white = torch.full((40, 1, 8, 8), -1.0), torch.full((40, 1, 8, 8), 1.0)
    sections: list[report.Section] = [
        report.Prose(evil, evil),
        report.Table("Methods", COLUMNS, ROWS, "Sorted, filtered."),
        report.Table(evil, [evil, "x" * 60], [[evil, "0"]], evil),
        report.Table("Wide", [f"FID of {n} iterations" for n in range(16)], [["+0.1234 ± 0.5678"] * 16] * 2),
        report.Comparison.of_samples(evil, black, white, ("black", "white"), evil),
        report.Picture(evil, report.metric_curves({evil: [(1, 2.0), (2, 1.0)]}, evil), evil),
        report.Picture(evil, report.image_grid(images), evil),
        report.Code(evil, evil + "y" * 300),
        report.KeyValues(evil, {evil: evil}),
    ]
    report.write_page(path, evil, evil, sections)


class Parsed(HTMLParser):
    """Tags with their attributes, and what is in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem:
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of each tag of that name."""
        return [attributes for tag, attributes in self.tags if tag == name]
