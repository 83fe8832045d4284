"""A page as text: nothing of what it is given becomes markup, nothing comes from elsewhere, and it stays small."""

import base64
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch import report
from stagepatch.report import page as pages_of_report
from tests.report import pages


def decode(uri):
    kind, data = re.fullmatch("data:image/(png|webp);base64,(.+)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    return image


def images_of(text):
    return [decode(attributes["src"]) for attributes in pages.Parsed(text).all("img")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    pages.write(path)
    return path.read_text()


def test_what_it_is_given_stays_text(text):
    page = pages.Parsed(text)
    script = Path(pages_of_report.__file__).with_name("page.js").read_text()
    assert page.scripts == [script]
    assert "</" not in script
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.all("img"))
    assert len(page.all("img")) == 4
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(pages.EVIL) == 27
    assert text.count("<script") == 1


def test_it_runs_its_own_script_alone_and_asks_for_nothing(text):
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)|@import|url\(|https?:", text)
    page = pages.Parsed(text)
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    assert allowed["script-src"] == f"'sha256-{digest}'"


def test_cells_say_what_they_are_sorted_by():
    table = report.Table("t", pages.COLUMNS, pages.ROWS)
    assert table.numeric == [False, True, True, True, False]
    assert table.is_filtered
    assert [row[1] for row in table.numbers] == [-2.0, 10.0, -12.5, 1.0, 0.0, 9.0, -1.0, 3.0, 4.0, 5.0]
    assert [row[3] for row in table.numbers][:6] == [0.01, None, 0.2, 0.05, 1e-5, None]
    short = report.Table("t", ["a", "b"], [["1", "2"], ["all", "inf"]])
    assert short.numeric == [False, True]
    assert not short.is_filtered
    assert report.Table("t", ["a"], []).numeric == []


def test_many_samples_lie_in_a_grid_that_fits_a_page():
    for size, count, width in ((8, 60, 10 * 32 + 18), (300, 9, 4 * 300 + 6), (32, 3, 3 * 32 + 4)):
        images = torch.zeros(count + 1, 3, size, size)
        found = report.Comparison.of_samples("", images, images[:-1], ("a", "b"), "")
        assert found.before.size == found.after.size
        assert found.before.width == width
    images = torch.zeros(4, 3, 1024, 1024)
    assert report.Comparison.of_samples("", images, images, ("a", "b"), "").before.width == 1920


def noise(size, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_pictures_of_a_page_that_would_be_too_large_shrink_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages_of_report, "PAGE_BYTES", 300_000)
    small = report.image_grid(torch.zeros(1, 1, 8, 8))
    sections = [
        report.Picture("", small, ""),
        report.Comparison("", noise(300, 0), noise(300, 1), ("a", "b"), ""),
        report.Picture("", noise(400, 2), ""),
        report.Picture("", report.metric_curves({"a": [(1, 2.0)]}, "FID"), ""),
    ]
    report.write_page(tmp_path / "report.html", "", "", sections)
    text = (tmp_path / "report.html").read_text()
    assert 200_000 < len(text) < 300_000
    untouched, first, second, large, plot = images_of(text)
    assert untouched.format == plot.format == "PNG"
    assert first.format == second.format == large.format == "WEBP"
    assert first.size == second.size < (300, 300)
    assert "3 of its pictures are compressed" in text
    report.write_page(tmp_path / "report.html", "", "", sections[:1])
    assert "compressed" not in (tmp_path / "report.html").read_text()


def test_a_page_of_nothing_but_text_is_written_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(pages_of_report, "PAGE_BYTES", 10)
    report.write_page(tmp_path / "report.html", "", "", [report.Picture("", noise(80, 0), "")])
    (image,) = images_of((tmp_path / "report.html").read_text())
    assert 16 <= image.width <= 64
