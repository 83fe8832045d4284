"""Images of a source: sizes known beforehand, and what happens to broken files."""

import logging
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig, FolderSource, Images, in_memory
from tests.data.reading import picture, shown, summary


def images(folder, **choices):
    return Images(FolderSource(folder), DataConfig(**{"image_size": 8, "bucket_step": 2, **choices}))


def values(dataset):
    return [value for value, _, _ in summary(dataset)]


def truncated(path, size=(64, 64)):
    """A JPEG with a good header and half of its data."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def fill(folder, **files):
    """a.png, b.png, … by name: a flat image of a value or a size, None for no image at all, "cut" for half a JPEG."""
    for name, what in files.items():
        if what is None:
            (folder / f"{name}.png").write_bytes(b"not an image")
        elif what == "cut":
            truncated(folder / f"{name}.jpg")
        else:
            image = picture(0, what) if isinstance(what, tuple) else picture(what, (12, 12))
            image.save(folder / f"{name}.png")
    return folder


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "stagepatch")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "stagepatch"]


def test_items(tmp_path, warnings):
    fill(tmp_path, a=200)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "grey"}')
    dataset = images(tmp_path)
    assert set(dataset[0]) == {"image", "label", "caption"}
    assert dataset[0]["image"].shape == (3, 8, 8)
    assert summary(dataset) == [(200, 0, "grey")]
    assert warnings() == []


def test_items_end(tmp_path):
    dataset = images(fill(tmp_path, a=0, b=7))
    assert shown(dataset[-1]) == 7
    with pytest.raises(IndexError):
        dataset[2]


def test_sizes_are_known_without_decoding(tmp_path, monkeypatch):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # a quarter turn: shown upright, width and height change places
    picture(0, (40, 20)).save(tmp_path / "a.png")
    picture(0, (20, 40)).save(tmp_path / "b.jpg")
    picture(0, (40, 20)).save(tmp_path / "c.jpg", exif=sideways)
    picture(0, (40, 20)).save(tmp_path / "d.png", exif=sideways)
    picture(0, (30, 30)).save(tmp_path / "e.webp")
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", Mock(side_effect=AssertionError("pixels were decoded")))
        dataset = images(tmp_path, crop="buckets")
        sizes = dataset.sizes()
    # In units of the step 2: at most 16 of them, so 1:2 is 4×8 pixels.
    assert sizes == [(4, 8), (8, 4), (8, 4), (8, 4), (8, 8)]
    assert [tuple(dataset[index]["image"].shape[1:]) for index in range(5)] == sizes


def test_squares_make_one_tensor_and_buckets_do_not(tmp_path):
    fill(tmp_path, a=(40, 20), b=(20, 40))
    assert images(tmp_path).sizes() == [(8, 8), (8, 8)]
    with pytest.raises(UserError, match=r"2 sizes.*crop=center"):
        in_memory(images(tmp_path, crop="buckets"))


def test_broken_headers_are_named_once_and_left_out(tmp_path, warnings):
    fill(tmp_path, a=10, b=None, c=30, d=(99, 99))
    cut = (tmp_path / "d.png").read_bytes()
    (tmp_path / "d.png").write_bytes(cut[:-20])  # verify finds a PNG's missing end
    assert values(images(tmp_path, max_broken=2)) == [10, 30]
    (warning,) = warnings()
    assert all(part in warning for part in ("2 of 4 images", "b.png", "d.png"))


def test_labels_and_captions_are_those_of_the_good_items(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, a=None if name == "y" else 0)
    (tmp_path / "metadata.csv").write_text("file_name,text\nx/a.png,first\ny/a.png,second\nz/a.png,third\n")
    dataset = images(tmp_path)
    assert dataset.labels() == [0, 2]
    assert dataset.captions() == [["first"], ["third"]]


def test_too_many_broken_headers(tmp_path):
    fill(tmp_path, **dict.fromkeys("abcde"), f=0)
    with pytest.raises(UserError) as refusal:
        images(tmp_path, max_broken=4)
    message = str(refusal.value)
    parts = ("5 of 6 images", "a.png", "b.png", "c.png", "repair or remove them, or raise data.max_broken=4")
    assert all(part in message for part in parts)
    assert "d.png" not in message
    assert len(images(tmp_path, max_broken=5)) == 1


@pytest.mark.parametrize(
    ("files", "limit", "message"),
    [
        ({"a": None}, 10, r"1 of 1 images: .*a\.png.*repair or remove them\.$"),
        ({"a": "cut", "b": "cut"}, 10, r"2 of 2 images: .*a\.jpg.*b\.jpg.*repair or remove"),
        # Headers and pixels count against one limit.
        ({"a": None, "b": "cut", "c": 30}, 1, r"2 of 3 images: .*a\.png.*b\.jpg.*data\.max_broken=1"),
    ],
)
def test_too_many_broken_or_nothing_else(tmp_path, files, limit, message):
    with pytest.raises(UserError, match=message):
        images(fill(tmp_path, **files), max_broken=limit)[0]


@pytest.mark.parametrize(
    ("files", "limit", "expected"),
    [
        ({"a": 10, "b": "cut", "c": "cut", "d": 40}, 10, [10, 40, 40, 40]),
        ({"a": 10, "b": "cut"}, 10, [10, 10]),  # after the last image comes the first
        ({"a": None, "b": "cut", "c": 30}, 2, [30, 30]),
    ],
)
def test_truncated_image_is_replaced_by_the_next_good_one(tmp_path, warnings, files, limit, expected):
    dataset = images(fill(tmp_path, **files), max_broken=limit)
    before = len(warnings())
    assert before == list(files.values()).count(None)
    for _ in range(2):
        assert values(dataset) == expected
    cut = [f"{name}.jpg" for name, what in files.items() if what == "cut"]
    assert [name in warning for name, warning in zip(cut, warnings()[before:], strict=True)] == [True] * len(cut)


def test_an_image_that_is_good_is_shown_whatever_is_broken(tmp_path):
    assert shown(images(fill(tmp_path, a=None, b="cut", c=30), max_broken=1)[1]) == 30


def test_a_replacement_has_the_size_of_what_it_replaces(tmp_path):
    truncated(tmp_path / "a.jpg", size=(64, 32))
    picture(20, (20, 40)).save(tmp_path / "b.png")
    dataset = images(tmp_path, crop="buckets")
    assert dataset.sizes() == [(4, 8), (8, 4)]
    assert dataset[0]["image"].shape == (3, 4, 8)
    assert shown(dataset[0]) == 20


def test_loading_processes_count_together(tmp_path):
    # Two processes take items in turn: each meets one truncated image, and a good one after it.
    fill(tmp_path, a="cut", b=10, c=20, d="cut", e=40)

    def load(limit):
        return [shown(batch) for batch in DataLoader(images(tmp_path, max_broken=limit), num_workers=2)]

    assert load(2) == [10, 10, 20, 40, 40]
    with pytest.raises(UserError, match="2 of 5 images"):
        load(1)


def test_a_mistake_is_not_a_broken_image(tmp_path, monkeypatch):
    source = FolderSource(fill(tmp_path, a=0, b=0))
    dataset = Images(source, DataConfig())
    monkeypatch.setattr(source, "load", Mock(side_effect=UserError("the disk is another one")))
    with pytest.raises(UserError, match="another one"):
        dataset[0]
    with pytest.raises(UserError, match=r"^the disk is another one$"):
        Images(source, DataConfig())


def test_a_header_like_a_bomb_is_a_broken_image(tmp_path, monkeypatch):
    fill(tmp_path, a=10, b=(60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert len(images(tmp_path)) == 1


@pytest.mark.parametrize("setting", ["image_size", "max_broken"])
def test_settings_below_their_least(tmp_path, setting):
    with pytest.raises(UserError, match=f"{setting}=-1 must be at least"):
        images(fill(tmp_path, a=0), **{setting: -1})
