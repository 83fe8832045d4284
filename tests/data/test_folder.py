"""Folders of images."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.core.errors import UserError
from stagepatch.data import FolderSource, in_memory
from tests.data.reading import load, summary


def paint(path, colour, size=(12, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def captions(folder, **choices):
    return [caption for _, _, caption in summary(load(folder, **choices))]


@pytest.fixture
def three(tmp_path):
    for name in ("a", "b", "sub/c"):
        paint(tmp_path / f"{name}.png", (0, 0, 0))
    return tmp_path


def write_rows(folder, *rows):
    """A row that is a string is written as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_subfolders_are_classes_in_alphabetical_order(tmp_path):
    paint(tmp_path / "zebra" / "1.png", (255, 0, 0))
    paint(tmp_path / "ant" / "2.jpg", (0, 0, 255), quality=100)
    paint(tmp_path / "ant" / "deeper.txt.png", (0, 255, 0))
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    dataset = load(tmp_path, channels=3)
    assert [label for _, label, _ in summary(dataset)] == [0, 0, 1]
    red = dataset[2]["image"]
    assert (red.shape, red.dtype) == ((3, 8, 8), torch.float32)
    torch.testing.assert_close(red[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_images_are_cropped_at_the_centre_and_scaled(tmp_path):
    # Three stripes, 8 pixels wide each: the crop of a wide image is its middle stripe.
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, :8], stripes[:, 8:16], stripes[:, 16:] = 50, 100, 200
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    torch.testing.assert_close(load(tmp_path, channels=3)[0]["image"], torch.full((3, 8, 8), 100 / 127.5 - 1))
    assert load(tmp_path, channels=3, image_size=16)[0]["image"].shape == (3, 16, 16)


def test_grey_and_alpha_and_orientation(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 255)).save(tmp_path / "a.png")
    assert load(tmp_path)[0]["image"].shape == (1, 8, 8)
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.fromarray(half).save(tmp_path / "b.png", exif=exif)
    turned = load(tmp_path)[1]["image"][0]
    assert (turned[0].mean(), turned[-1].mean()) == (-1, 1)


def test_whole_folder_in_memory(tmp_path):
    for index in range(3):
        paint(tmp_path / f"{index}.png", (index, index, index))
    data = in_memory(load(tmp_path, channels=3))
    assert data.images.shape == (3, 3, 8, 8)
    assert data.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("prepare", "choices", "message"),
    [
        (lambda folder: folder.mkdir(), {}, "No image in"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"text")), {}, r"a\.png.*repair or remove"),
        (lambda folder: None, {"format": "folder"}, "No image folder at"),
        (lambda folder: paint(folder / "a.png", (0, 0, 0)), {"channels": 2}, "channels=2 must be 1"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, prepare, choices, message):
    prepare(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "images", **choices)


def test_captions_from_jsonl(three):
    write_rows(three, {"file_name": "sub/c.png", "text": "a «third»"}, {"file_name": "./a.png", "text": "first"})
    assert captions(three) == ["first", "", "a «third»"]


def test_captions_from_csv(three):
    (three / "metadata.csv").write_text('file_name,said\nb.png,"one, two"\na.png,\n')
    assert captions(three, caption_column="said") == ["", "one, two", ""]


def test_without_metadata_or_a_column_there_are_no_captions(three):
    assert captions(three) == ["", "", ""]
    (three / "metadata.jsonl").write_text("not read")
    assert captions(three, caption_column="") == ["", "", ""]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "gone.png", "text": ""}, r"Row 2.*metadata\.jsonl.*'gone\.png'"),
        ({"file": "a.png", "text": ""}, r"Row 2.*'None'"),
        ({"file_name": "a.png", "text": ["one", 2]}, r"Row 2.*\['one', 2\] as 'text'.*a list of strings"),
        ('"a.png"', "line 2 holds str"),
        ('{"file', r"metadata\.jsonl.*line 2 is not JSON"),
    ],
)
def test_metadata_that_do_not_fit(three, row, message):
    write_rows(three, {"file_name": "b.png", "text": "well"}, row)
    with pytest.raises(UserError, match=message):
        load(three)


def test_metadata_without_the_caption_column_say_which_there_are(three):
    write_rows(three, {"file_name": "b.png", "caption": "x"})
    with pytest.raises(UserError, match=r"no column 'text', but caption, file_name: .*data\.caption_column"):
        load(three)


def test_stamps_follow_content_time_and_caption(three):
    first, again = FolderSource(three).stamp(), FolderSource(three).stamp()
    assert len(set(first)) == 3
    assert again == first
    paint(three / "b.png", (1, 2, 3), size=(13, 13))
    second = FolderSource(three).stamp()
    assert [old == new for old, new in zip(first, second, strict=True)] == [True, False, True]
    os.utime(three / "a.png", ns=(1, 1))
    write_rows(three, {"file_name": "sub/c.png", "text": "new"})
    third = FolderSource(three).stamp()
    assert [old == new for old, new in zip(second, third, strict=True)] == [False, True, False]
