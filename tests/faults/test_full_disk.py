"""A disk that is really full: a small tmpfs, where it may be mounted."""

import os
import shutil
import subprocess

import pytest

from tests.faults.commands import INPUTS, at_work, command, facts, new_place, write_inputs


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def inputs(processes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    write_inputs(directory)
    processes.call(command, arguments=INPUTS[0], directory=directory)
    return directory / "inputs"


@pytest.mark.parametrize("name", ["train", "cache"])
def test_what_was_begun_on_a_disk_that_fills_goes_on_when_there_is_room(processes, small_disk, tmp_path, inputs, name):
    arguments = at_work(name)
    whole = new_place(inputs, tmp_path / "whole")
    processes.call(command, arguments=arguments, directory=whole)
    place = new_place(inputs, small_disk / "run")
    needed = sum(path.stat().st_size for path in (whole / "out").rglob("*"))
    for share in (0.2, 0.9):
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        with open(small_disk / "ballast", "wb") as ballast:
            ballast.write(bytes(room - int(share * needed)))
        output = processes.call(command, expected=2, arguments=arguments, directory=place)
        assert "No space left on device" in output
        assert "Traceback" not in output
        (small_disk / "ballast").unlink()
    processes.call(command, arguments=arguments, directory=place)
    assert facts(place / "out") == facts(whole / "out")
