import errno
import fcntl
import importlib.util
import json
import os
import struct
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.core.files import append_text, read_json, whole_directory, write_atomically, write_json, write_text
from stagepatch.core.tensors import TensorReader, read_tensors, write_tensors
from tests.runs import assert_same

OLD = "what was there before\n"
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text(OLD)
    return path


def assert_untouched(path):
    assert path.read_text() == OLD
    assert list(path.parent.iterdir()) == [path]


def out_of_space(*_, **__):
    raise NO_SPACE


def test_writes_a_whole_file_that_others_may_read_and_nothing_beside_it(path):
    write_text(path, "new\n")
    assert path.read_text() == "new\n"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["bare.txt", "a/b/c.txt"])
def test_takes_a_bare_name_and_makes_the_directories_above(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_text(name, "new\n")
    assert (tmp_path / name).read_text() == "new\n"


def test_old_file_is_whole_until_the_new_one_is(path):
    def write(temporary):
        temporary.write_text("half")
        assert path.read_text() == OLD
        assert temporary.parent == path.parent  # else the rename would be a copy

    write_atomically(path, write)
    assert path.read_text() == "half"


def test_what_a_killed_process_left_half_written_goes(path):
    dead, living = (path.with_name(f".{path.name}.{ending}") for ending in ("abcd1234", "efgh5678"))
    dead.write_text("ha")
    with open(living, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process does that writes it
        write_text(path, "new\n")
    assert sorted(path.parent.iterdir()) == sorted([living, path])


def test_a_file_that_another_process_takes_for_unfinished_before_it_is_locked(path, monkeypatch):
    make, made = tempfile.mkstemp, []

    def take_the_first(**options):
        made.append(make(**options))
        if len(made) == 1:
            os.unlink(made[0][1])
        return made[-1]

    def write(temporary):
        with pytest.raises(BlockingIOError), open(temporary, "rb") as file:  # none takes this one
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.write_text("new\n")

    monkeypatch.setattr(tempfile, "mkstemp", take_the_first)
    write_atomically(path, write)
    assert path.read_text() == "new\n"
    assert list(path.parent.iterdir()) == [path]


def test_where_there_is_no_fcntl_files_are_whole_too(path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    elsewhere = importlib.util.module_from_spec(files_of := importlib.util.find_spec("stagepatch.core.files"))
    files_of.loader.exec_module(elsewhere)
    elsewhere.write_text(path, "new\n")
    assert path.read_text() == "new\n"
    with pytest.raises(RuntimeError, match="in the middle"):
        elsewhere.write_atomically(path, Mock(side_effect=RuntimeError("in the middle")))
    assert list(path.parent.iterdir()) == [path]


def test_flushes_to_disk_before_it_renames(path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda *args: steps.append("rename") or replace(*args))
    write_text(path, "new\n")
    assert steps == ["fsync", "rename", "fsync"]  # the last of the directory


def test_a_directory_is_whole_or_absent(tmp_path):
    path = tmp_path / "made"
    killed = whole_directory(path)
    write_text(killed.__enter__() / "first", "of a run that is killed")
    assert not path.exists()
    with whole_directory(path) as directory:
        write_text(directory / "second", "2")
        assert not path.exists()
    assert [each.name for each in path.iterdir()] == ["second"]
    with whole_directory(path) as directory:
        write_text(directory / "second", "3")
    assert (path / "second").read_text() == "3"
    assert [each.name for each in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("error", "seen"),
    [*((kind("in the middle"), kind) for kind in (RuntimeError, KeyboardInterrupt, TypeError)), (NO_SPACE, UserError)],
    ids=repr,
)
def test_writer_that_raises_leaves_the_old_file(path, error, seen):
    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(seen, match=r"in the middle|No space left"):
        write_atomically(path, write)
    assert_untouched(path)


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (tempfile, "mkstemp"), (Path, "mkdir")])
def test_full_disk_leaves_the_old_file(path, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, out_of_space)
    with pytest.raises(UserError, match=r"Cannot write '.*file.txt': No space left on device.*intact"):
        write_text(path, "new\n")
    monkeypatch.undo()
    assert_untouched(path)


def test_full_disk_leaves_the_old_tensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"old": torch.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", out_of_space)
        with pytest.raises(UserError, match="No space left"):
            write_tensors(path, {"new": torch.zeros(2)})
    assert list(read_tensors(path)[0]) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_file_where_a_directory_should_be(path):
    with pytest.raises(UserError, match="Cannot write"):
        write_text(path / "below.txt", "new\n")
    assert_untouched(path)


def test_directory_where_the_file_should_be(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        write_text(tmp_path / "taken", "new\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_value_that_json_cannot_hold_leaves_the_old_file(path):
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert_untouched(path)


def test_json_round_trip_is_indented_and_ends_with_a_newline(tmp_path):
    value = {"name": "dé→", "layers": [1, 2], "scale": 0.1, "none": None}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert '\n  "layers"' in text
    assert read_json(str(tmp_path / "a.json")) == json.loads(text) == value


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe\x00", b"hello"])
def test_bad_json_is_named(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file.txt' as JSON"):
        read_json(path)


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_no_object_is_named(path, content, kind):
    path.write_text(content)
    with pytest.raises(UserError, match=f"holds {kind}, not a JSON object"):
        read_json(path)


def test_json_is_read_as_utf_8_in_every_locale(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_bytes('{"name": "dé→"}'.encode())
    encodings = []
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, encoding=None: encodings.append(encoding) or read(path, encoding)
    )
    assert read_json(tmp_path / "a.json") == {"name": "dé→"}
    assert encodings == ["utf-8"]


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_missing_file_and_directory_are_named(tmp_path, read):
    with pytest.raises(UserError, match=r"No such file: '.*absent'"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match=tmp_path.name):
        read(tmp_path)


def test_tensors_and_metadata_round_trip(tmp_path):
    path = tmp_path / "model.safetensors"
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "float": torch.randn(3, 2),
        "half": torch.randn(4).bfloat16(),
        "integer": torch.tensor([1, 2]),
        "scalar": torch.tensor(1.5),
        "transposed": shared.T,
        "same storage": shared,
        "with gradient": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(path, tensors, {"step": "12", "name": "dé→"})
    read, metadata = read_tensors(str(path))
    assert metadata == {"format": "pt", "step": "12", "name": "dé→"}
    assert_same(read, {name: tensor.detach() for name, tensor in tensors.items()})
    assert not any(tensor.requires_grad for tensor in read.values())


def test_transformers_and_diffusers_can_read_it(tmp_path):
    from diffusers.models.model_loading_utils import load_state_dict

    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    assert torch.equal(load_state_dict(tmp_path / "model.safetensors")["a"], torch.ones(2))


def test_safetensors_cut_off_anywhere_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.randn(10), "b": torch.randn(5)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model.safetensors' is not a whole safetensors file"):
            read_tensors(path)


def test_file_of_another_format_is_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="of another format"):
        read_tensors(tmp_path / "model.safetensors")


def test_append_adds_lines_and_tells_of_a_full_disk(tmp_path):
    append_text(tmp_path / "log", "a\n")
    append_text(tmp_path / "log", "b\n")
    assert (tmp_path / "log").read_text() == "a\nb\n"
    with pytest.raises(UserError, match="Cannot write '/dev/full': No space left"):
        append_text("/dev/full", "a")


def test_a_dtype_that_is_not_read_here_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"odd": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    assert TensorReader([path]).shape("odd") == (2,)
    with pytest.raises(UserError, match="holds 'odd' as F4, which is none of F64"):
        TensorReader([path]).read("odd")
