"""Clips of videos: the right frames, cropped as images are; and what happens to videos that do not serve."""

import logging
import random
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.data import Clips, DataConfig, FolderSource, Images, load_dataset, open_source
from stagepatch.data.video import choose_frames
from stagepatch.evaluation import load_references
from tests.data.filming import film
from tests.data.reading import picture

VALUES = range(0, 240, 20)  # of 12 frames
OTHER_FORMATS = {
    "mp4": ("libx264", "yuv420p", {"bf": "3"}),  # frames that are not stored in their order
    "mov": ("libx264rgb", "rgb24", {"crf": "0"}),
    "webm": ("libvpx-vp9", "yuv420p", {}),
    "avi": ("mpeg4", "yuv420p", {}),
    "mkv": ("ffv1", "bgr0", {}),
}


def clips(folder, **choices):
    config = DataConfig(**{"source": str(folder), "image_size": 8, "num_frames": 5, **choices})
    return Clips(open_source(config), config)


def shown(item):
    """The value of each frame of a clip of flat ones."""
    return [round((float(frame.mean()) + 1) * 127.5) for frame in item["image"].unbind(1)]


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_frames_are_taken_at_their_times_whatever_the_container(tmp_path, kind):
    codec, pix_fmt, options = OTHER_FORMATS[kind]
    film(tmp_path / f"a.{kind}", VALUES, 24, codec, pix_fmt, **options)
    for fps, numbers in ((0, (0, 1, 2, 3, 4)), (24, (0, 1, 2, 3, 4)), (12, (0, 2, 4, 6, 8)), (16, (0, 1, 3, 4, 6))):
        assert shown(clips(tmp_path, fps=fps)[0]) == pytest.approx([VALUES[number] for number in numbers], abs=5)


def test_a_gif_keeps_its_own_clock(tmp_path):
    frames = [Image.new("L", (16, 16), value) for value in VALUES]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 300] * 6)
    # They are shown from 0, 0.1, 0.4, 0.5, 0.8 s.
    assert shown(clips(tmp_path, fps=5)[0]) == [0, 20, 40, 60, 80]
    assert shown(clips(tmp_path, fps=10)[0]) == [0, 20, 20, 20, 40]


def test_frames_that_last_unequally_are_taken_by_the_clock(tmp_path):
    film(tmp_path / "a.mkv", [10, 20, 30, 40, 50, 60], 10, times=[0, 1, 2, 10, 11, 12])
    assert shown(clips(tmp_path, fps=5)[0]) == [10, 30, 30, 30, 30]
    assert shown(clips(tmp_path, fps=4, num_clips=2)[1]) == [30, 30, 30, 30, 60]  # 0.2 s to 1.2 s


def test_clips_lie_from_the_beginning_to_the_end(tmp_path):
    film(tmp_path / "a.mkv", VALUES)
    film(tmp_path / "b.mkv", VALUES[:6])
    dataset = clips(tmp_path, num_clips=3)
    firsts = [shown(dataset[index])[0] for index in range(len(dataset))]
    assert firsts == [VALUES[0], VALUES[3], VALUES[7], VALUES[0], VALUES[1]]  # there are but two of 5 in 6
    assert dataset.sizes() == [(8, 8)] * 5
    assert dataset.labels() == [0] * 5


@pytest.mark.parametrize("rate", [8, 23.976, 24, 25, 29.97, 30, 60])
def test_rounded_times_give_the_frames_that_exact_ones_do(rate):
    """Matroska rounds times to milliseconds. Against the frame that is shown at a time: ⌊time · rate⌋."""
    rate, unit = Fraction(rate), Fraction(1, 1000)
    times = [round(number / rate / unit) for number in range(100)]
    for fps in (rate, rate / 2, rate / 3, rate * 2):
        first, last = choose_frames(times, round(100 / rate / unit), 9, fps * unit, 2)
        assert first == [int(number * rate / fps) for number in range(9)]
        assert [number - last[0] for number in last] == first
        assert last[-1] == 99 or rate * 2 == fps


def test_chosen_frames_are_those_that_are_shown():
    """Against a search of every frame, of times that are whole frames apart."""
    generator = random.Random(0)
    for _ in range(200):
        times = sorted(generator.sample(range(0, 4000, 20), 30))
        end, rate, num_frames = times[-1] + 20, Fraction(generator.randint(5, 80), 1000), generator.randint(2, 9)
        for clip in choose_frames(times, end, num_frames, rate, 3):
            wanted = [times[clip[0]] + number / rate for number in range(num_frames)]
            for number, time in zip(clip, wanted, strict=True):
                assert times[number] <= time + 1
                assert number == 29 or time < times[number + 1]


def test_frames_are_cropped_and_turned_as_images_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 20, 44, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    film(tmp_path / "a.mkv", pictures)
    film(tmp_path / "b.mov", pictures, 24, "libx264rgb", "rgb24", rotation=-90, crf="0")
    for number, each in enumerate(pictures):
        each.save(tmp_path / f"a{number}.png")
        each.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"b{number}.png")  # a quarter turn clockwise
    for choices in ({}, {"crop": "buckets", "bucket_step": 4}, {"channels": 1}):
        config = DataConfig(source=str(tmp_path), image_size=16, **choices)
        images = Images(FolderSource(tmp_path), config)
        expected = [torch.stack([images[5 * clip + frame]["image"] for frame in range(5)], dim=1) for clip in (0, 1)]
        dataset = clips(tmp_path, image_size=16, **choices)
        assert dataset.sizes() == [images.sizes()[0], images.sizes()[5]]
        assert all(torch.equal(dataset[clip]["image"], expected[clip]) for clip in (0, 1))


def test_captions_and_classes_are_found_as_those_of_images(tmp_path):
    for name in ("cats/a", "dogs/b"):
        film(tmp_path / f"{name}.mkv", VALUES)
    (tmp_path / "cats" / "a.txt").write_text("a cat\na grey cat\n")
    dataset = clips(tmp_path, num_clips=2)
    assert dataset.captions() == [["a cat", "a grey cat"]] * 2 + [[""]] * 2
    assert [dataset[index]["label"] for index in range(4)] == [0, 0, 1, 1]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "dogs/b.mkv", "text": "a dog"}')
    assert [dataset["caption"] for dataset in clips(tmp_path)] == ["", "a dog"]


def test_videos_that_do_not_serve_are_named_and_left_out(tmp_path, caplog):
    film(tmp_path / "good.mkv", VALUES)
    film(tmp_path / "short.mkv", VALUES[:4])
    film(tmp_path / "sound.mkv", VALUES)
    whole = film(tmp_path / "cut.mp4", VALUES, 24, "libx264", "yuv420p").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.webm").touch()
    with caplog.at_level(logging.WARNING, "stagepatch"):
        dataset = clips(tmp_path)
    assert shown(dataset[0]) == [0, 20, 40, 60, 80]
    assert len(dataset) == 2
    (warning,) = caplog.messages
    assert warning.startswith("3 of 5 videos cannot be read and are left out: ")
    assert "short.mkv (4 frames in 0.17 s, too short for 5)" in warning
    assert "cut.mp4 (Invalid data" in warning
    assert "empty.webm (Invalid data" in warning
    with pytest.raises(
        UserError, match=r"Cannot read 5 of 5 videos: .*12 frames in 0.50 s, too short for 5 at 4 a sec"
    ):
        clips(tmp_path, fps=4)
    with pytest.raises(UserError, match=r"Cannot read 3 of 5 videos: .*raise data\.max_broken=2"):
        clips(tmp_path, max_broken=2)


def test_a_video_that_breaks_while_it_is_read_is_replaced_by_the_next(tmp_path, caplog):
    film(tmp_path / "a.mkv", VALUES)
    film(tmp_path / "b.mkv", VALUES[2:])
    dataset = clips(tmp_path, num_clips=2, max_broken=1)
    (tmp_path / "a.mkv").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "stagepatch"):
        assert shown(dataset[0])[0] == shown(dataset[1])[0] == VALUES[2]
    assert "One video cannot be decoded; the next good one replaces it" in caplog.text
    (tmp_path / "b.mkv").write_bytes(b"")
    with pytest.raises(UserError, match=r"Cannot read 2 of 2 videos: .*a\.mkv .*; .*b\.mkv"):
        dataset[2]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_frames": 5, "fps": -1}, "fps=-1 must be at least 0"),
        ({"num_frames": 5, "num_clips": 0}, "num_clips=0 must be at least 1"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"num_frames": 5, "format": "webdataset"}, "takes a folder, not data.format='webdataset'"),
        ({"num_frames": 5, "source": "nowhere"}, "No video folder at 'nowhere'"),
    ],
)
def test_choices_that_cannot_be(tmp_path, choices, message):
    film(tmp_path / "a.mkv", VALUES)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=message):
        clips(tmp_path, **choices)


def test_where_images_are_meant_videos_are_refused_in_words(tmp_path):
    film(tmp_path / "a.mkv", VALUES)
    with pytest.raises(UserError, match=r"No image in .*It has videos: data\.num_frames above 1 takes these"):
        load_dataset(DataConfig(source=str(tmp_path)))
    for load in (load_dataset, load_references):
        with pytest.raises(UserError, match=r"num_frames=5: .*here images are wanted"):
            load(DataConfig(source=str(tmp_path), num_frames=5))
    (tmp_path / "a.mkv").unlink()
    with pytest.raises(UserError, match=r"No video in .*looked for \.avi, \.gif"):
        clips(tmp_path)


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    film(tmp_path / "a.mkv", VALUES)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'stagepatch\[video\]'"):
        clips(tmp_path)
    given = [f"--data.source={tmp_path}", "--data.num_frames=5", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", "--model=digits", *given]) == 2
    assert "here images are wanted" in capsys.readouterr().err
