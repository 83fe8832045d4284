"""WebDataset shards, written with tarfile."""

import io
import json
import os
import pickle
import tarfile

import pytest
from torch.utils.data import DataLoader

from stagepatch.core.errors import UserError
from stagepatch.data import WebDatasetSource
from tests.data.reading import encoded, load, shown, summary


def write_shard(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    first = {"000.png": encoded(10), "000.txt": "ten\n", "000.cls": "3", "001.cls": "1", "001.png": encoded(20)}
    second = {
        "dir/a.b.png": encoded(99),  # the extension is b.png, so this is no image of sample a
        "dir/a.JPG": encoded(30, "JPEG"),
        "dir/a.json": json.dumps({"caption": "thirty", "text": "not this", "label": 2}),
        "other/a.webp": encoded(40, "WEBP"),
        "other/a.json": json.dumps({"text": "forty"}),
        "alone.txt": "no image here",
        "x.jpeg": encoded(50, "JPEG"),
        "x.txt": "before json",
        "x.json": json.dumps({"caption": "after txt", "label": 7}),
    }
    write_shard(tmp_path / "shard-1.tar", second)
    write_shard(tmp_path / "shard-0.tar", first)
    return tmp_path


def test_samples_with_captions_and_labels(shards):
    assert summary(load(shards)) == [
        (10, 3, "ten"),
        (20, 1, ""),
        (30, 2, "thirty"),
        (40, 0, "forty"),
        (50, 7, "before json"),
    ]
    assert len(load(shards / "shard-0.tar")) == 2


def test_access_is_random_and_from_several_processes(shards):
    dataset = load(shards)
    assert [shown(dataset[index]) for index in (3, 0, 4, 0)] == [40, 10, 50, 10]
    loader = DataLoader(dataset, batch_size=1, num_workers=2, sampler=[4, 1, 3, 0, 2] * 4)
    assert [shown(batch) for batch in loader] == [50, 20, 40, 10, 30] * 4
    assert pickle.loads(pickle.dumps(WebDatasetSource(shards))).captions(0) == ["ten"]


def test_a_shard_is_read_through_once(shards, monkeypatch):
    dataset = load(shards)
    monkeypatch.setattr(tarfile, "open", None)
    assert shown(dataset[2]) == 30


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_tar_format(tmp_path, form):
    name = "/".join(["folder" * 10] * 2) + "/ä" * 3 + "/image"
    write_shard(tmp_path / "a.tar", {f"{name}.png": encoded(60), f"{name}.txt": "long"}, format=form)
    assert summary(load(tmp_path)) == [(60, 0, "long")]


# The third member's header starts at 3 × 512 + 2 × 512, as a small member takes a header and one block.
@pytest.mark.parametrize("length", [700, 1024, 1024 + 100, 1024 + 512 + 20, 2048, 100])
def test_a_truncated_shard_is_named(tmp_path, length):
    path = write_shard(tmp_path / "cut.tar", {f"{index}.png": encoded(index) for index in range(4)})
    assert len(load(tmp_path)) == 4
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut\.tar' is not a whole.*fetch or write it again"):
        load(tmp_path)


def test_a_shard_that_is_cut_short_later_is_named(shards):
    dataset = load(shards)
    path = shards / "shard-0.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"shard-0\.tar' was cut short"):
        dataset[0]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar' is not a whole, uncompressed tar"):
        load(tmp_path)


def test_no_shard_and_shards_without_an_image(tmp_path):
    with pytest.raises(UserError, match=r"No tar shard at .*\*\.tar"):
        load(tmp_path, format="webdataset")
    write_shard(tmp_path / "a.tar", {"1.txt": "x", ".png": encoded(1), ".hidden.png": encoded(1)})
    with pytest.raises(UserError, match=r"No image in .*looked in its tar shards for jpg"):
        load(tmp_path)


def test_a_broken_image_is_named_with_its_shard(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", {"1.png": encoded(1), "deep/2.png": b"nothing"})
    assert len(load(tmp_path)) == 1
    assert f"'deep/2.png' in '{tmp_path / 'a.tar'}'" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.cls", "cat", r"label of '1\.png' in '.*a\.tar' is 'cat'"),
        ("1.cls", "-1", "label of .* is '-1'"),
        ("1.json", '{"label": null}', "label of .* is None"),
        ("1.json", "{", r"'1\.json' in '.*a\.tar' is not JSON"),
        ("1.json", '{"caption": ["a", 2]}', r"caption of .* is \['a', 2\].*a list of strings"),
        ("1.txt", b"\xff", r"'1\.txt' in '.*a\.tar' is not UTF-8"),
    ],
)
def test_members_that_make_no_sense(tmp_path, name, content, message):
    write_shard(tmp_path / "a.tar", {"1.png": encoded(1), name: content})
    with pytest.raises(UserError, match=message):
        load(tmp_path)[0]


def test_stamps_follow_the_shard(shards):
    first = WebDatasetSource(shards).stamp()
    assert len(set(first)) == 5
    assert WebDatasetSource(shards).stamp() == first
    os.utime(shards / "shard-0.tar", ns=(1, 1))
    again = WebDatasetSource(shards).stamp()
    assert [old == new for old, new in zip(first, again, strict=True)] == [False, False, True, True, True]
