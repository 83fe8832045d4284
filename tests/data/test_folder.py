"""Folders of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.data import DataConfig, in_memory, load_dataset
from stagepatch.errors import UserError


def paint(path, colour, size=(12, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def load(folder, **choices):
    return load_dataset(DataConfig(source=str(folder), **{"image_size": 8, **choices}))


def test_subfolders_are_classes_in_alphabetical_order(tmp_path):
    paint(tmp_path / "zebra" / "1.png", (255, 0, 0))
    paint(tmp_path / "ant" / "2.jpg", (0, 0, 255), quality=100)
    paint(tmp_path / "ant" / "deeper.txt.png", (0, 255, 0))
    (tmp_path / "ant" / "notes.txt").write_text("no picture")
    dataset = load(tmp_path)
    assert [dataset[i]["label"] for i in range(len(dataset))] == [0, 0, 1]
    red = dataset[2]["image"]
    assert red.shape == (3, 8, 8)
    assert red.dtype == torch.float32
    torch.testing.assert_close(red[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_images_are_cropped_at_the_centre_and_scaled(tmp_path):
    # Three stripes, 8 pixels wide each: the crop of a wide image is its middle stripe.
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, :8], stripes[:, 8:16], stripes[:, 16:] = 50, 100, 200
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    torch.testing.assert_close(load(tmp_path)[0]["image"], torch.full((3, 8, 8), 100 / 127.5 - 1))
    big = load(tmp_path, image_size=16)[0]["image"]
    assert big.shape == (3, 16, 16)


def test_grey_and_alpha_and_orientation(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 255)).save(tmp_path / "a.png")
    assert load(tmp_path, channels=1)[0]["image"].shape == (1, 8, 8)
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    Image.fromarray(half).save(tmp_path / "b.png", exif=exif)
    turned = load(tmp_path, channels=1)[1]["image"][0]
    assert turned[0].mean() == -1
    assert turned[-1].mean() == 1


def test_whole_folder_in_memory(tmp_path):
    for index in range(3):
        paint(tmp_path / f"{index}.png", (index, index, index))
    data = in_memory(load(tmp_path))
    assert data.images.shape == (3, 3, 8, 8)
    assert data.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "No image folder at"),
        (lambda folder: folder.mkdir(), "No image in"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"text")), r"a\.png.*repair or remove"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, prepare, message):
    prepare(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "images")


def test_truncated_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.jpg"):
        load(tmp_path)[0]


def test_other_channel_counts(tmp_path):
    paint(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(UserError, match="channels=2 must be 1"):
        load(tmp_path, channels=2)
