"""Pictures by their pixels, plots by their panels, tables by their text."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch import report


def test_grid_puts_every_pixel_where_it_belongs():
    images = torch.full((5, 1, 2, 2), -1.0)
    images[3, 0, 0, 1] = 1.0
    grid = report.image_grid(images, columns=3, scale=4)
    assert grid.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    assert grid.getpixel((3, 10)) == (0, 0, 0)
    # Image 3 (second row, first column) in its upper right quarter, the gap, and no sixth image.
    assert all(grid.getpixel(place) == (255, 255, 255) for place in ((4, 10), (8, 0), (27, 17)))


def test_grid_keeps_colour_and_shows_three_of_many_channels():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert report.image_grid(red).getpixel((5, 5)) == (255, 0, 0)
    latents = torch.stack([torch.full((32, 32), value) for value in (0.0, 5.0, 10.0, 99.0)]).unsqueeze(0)
    assert report.image_grid(latents).getpixel((5, 5)) == (0, 128, 255)


def test_small_images_are_enlarged():
    assert report.image_grid(torch.zeros(1, 1, 8, 8)).size == (32 * 10 + 2 * 9, 32)


def test_pairs_lie_at_equal_places_left_and_right():
    base, patched = torch.full((4, 1, 32, 32), -1.0), torch.full((4, 1, 32, 32), -1.0)
    patched[1] = 0.0
    picture, single = report.paired_grid(base, patched, columns=2), report.image_grid(base, columns=2)
    offset = picture.width - single.width
    assert offset > single.width
    assert picture.getpixel((40, 5)) == (0, 0, 0)
    assert picture.getpixel((offset + 40, 5)) == (128, 128, 128)


def test_a_pair_comes_apart_again():
    for size, columns in ((32, 1), (32, 5), (100, 10), (64, 3)):
        base = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2.0 - 1.0
        grids = report.paired_grids(base, -base, columns)
        for own, found in zip(grids, report.split_pair(report.paired_grid(base, -base, columns)), strict=True):
            assert np.array_equal(own, found)
        assert np.array_equal(grids[0], report.image_grid(base, columns))
    with pytest.raises(ValueError, match="no pair"):
        report.split_pair(Image.new("RGB", (41, 8)))


def test_latents_of_a_pair_are_stretched_alike():
    latents = torch.zeros(1, 4, 32, 32)
    latents[:, 1] = 4.0
    left, right = report.paired_grids(latents, 2.0 * latents)
    assert left.getpixel((5, 5)) == (0, 128, 0)
    assert right.getpixel((5, 5)) == (0, 255, 0)


def test_training_curves_have_a_panel_for_each_logged_quantity():
    records = [{"iteration": i, "loss": math.nan if i == 3 else 1.0 / (i + 1), "grad_norm": 1.0} for i in range(9)]
    records[4]["lr"] = 0.1
    figure = report.training_curves(records)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "gradient norm", "learning rate"]
    assert report.training_curves([]).axes == []


def test_heat_maps_are_labelled_where_there_is_room_and_grey_where_there_is_no_number():
    small, large = torch.eye(3), torch.eye(20)
    small[0, 1] = math.nan
    axes, *_ = report.similarity_heatmaps({"small": small}, ["a", "b", "c"], "stage").axes
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "0.00", "1.00", "0.00", "0.00", "0.00", "1.00"]
    assert axes.images[0].get_array().mask.sum() == 1
    two = report.similarity_heatmaps({"one": large, "two": -large}, [str(i) for i in range(20)], "timestep").axes
    assert [axes.get_title() for axes in two[:2]] == ["one", "two"]
    assert not two[0].texts
    assert len(two[0].get_xticks()) == 10


def test_metric_curves_draw_the_points_given():
    figure = report.metric_curves({"training": [(1, 2.0), (3, 1.0)]}, "FID")
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 2.0], [3, 1.0]]
    assert Image.open(io.BytesIO(report.to_png(figure))).width > 300


def test_names_with_dollars_are_no_mathematics_and_powers_of_ten_are():
    figure = report.metric_curves({r"$\frac$": [(1, 2.0), (1000, 1.0)]}, "$5 and $6")
    figure.axes[0].set_xscale("log")
    report.to_png(figure)
    report.to_png(figure)
    tick = figure.axes[0].get_xticklabels()[1]
    assert "mathdefault" in tick.get_text()
    assert tick.get_parse_math()


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("12.30 ± 0.40", 12.3),
        ("−1.5 %", -1.5),
        ("+1.5%", 1.5),
        ("1,024", 1024.0),
        (".706", 0.706),
        ("-0.01 to +0.02", -0.01),
        ("1.2e-05", 1.2e-5),
        ("-0.0312 ± 0.0100 *", -0.0312),
        ("0-0.25", None),
        ("3a23f97", None),
        ("2026-11-30", None),
        ("–", None),
        ("nan", None),
        ("", None),
    ],
)
def test_number_of_a_cell(cell, number):
    assert report.as_number(cell) == number


def test_tables():
    assert report.format_mean(12.345, 0.4) == "12.35 ± 0.40"
    assert report.format_mean(12.0, math.nan, 1) == "12.0"


def test_intervals_and_changes_as_text():
    assert report.format_interval(12.345, (11.5, 13.0), 2) == "12.35 [11.50, 13.00]"
    assert report.format_interval(-1e-9, (math.nan, math.nan)) == "0.0000"
    assert report.format_change(0.1, (-0.001, 0.2), 1, 100.0, " %") == "+10.0 [-0.1, +20.0] %"
    assert report.format_change(-1e-7, (-1e-6, 1e-6)) == "+0.0000 [+0.0000, +0.0000]"
    assert report.format_change(0.1, (math.nan, math.nan)) == ""
    assert report.markdown_table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n"


def test_print_table_shows_every_cell(capsys):
    report.print_table(["metric", "base"], [["FID", "1.5"]], "a title")
    text = capsys.readouterr().out
    assert all(cell in text for cell in ("a title", "metric", "base", "FID", "1.5"))


def test_print_table_takes_brackets_as_they_are(capsys):
    report.print_table(["[red]"], [["[/x]"]], "[b]")
    text = capsys.readouterr().out
    assert all(cell in text for cell in ("[red]", "[/x]", "[b]"))


def test_environment_names_versions_and_no_person_or_place():
    facts = report.environment()
    assert facts["torch"] == torch.__version__
    assert "stagepatch" in facts
    assert not any("/" in value or "@" in value for value in facts.values())
