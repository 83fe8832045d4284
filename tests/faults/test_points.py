"""A few of the points of `make faults`, and what else may befall a run's directory, its clock and its processes."""

import errno
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest

import stagepatch
from stagepatch.cli import main
from stagepatch.core import UserError, alone_in
from stagepatch.training.log import RunLog
from tests.faults.commands import facts
from tests.faults.strikes import FileStrike, library
from tests.runs import Strike, iteration_of, run, train_job

CHOICES = {"steps": 4, "checkpoint_every": 2, "snapshot_every": 2, "ema_decay": 0.5, "tensorboard": True}
pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler to build strike.c with")


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """Operations of a small run, and what its files hold."""
    directory = tmp_path_factory.mktemp("undisturbed")
    names = directory / "operations"
    strike = FileStrike(directory / "run", names=names)
    processes.call(train_job, strike=strike, directory=directory / "run", **CHOICES)
    return names.read_text().splitlines(), facts(directory / "run")


def last(operations, pattern):
    """The number of the last operation of that name."""
    return max(number for number, name in enumerate(operations, 1) if re.search(pattern, name))


def job(directory, **choices):
    """A run, for a process of its own, that ends as the command does."""
    try:
        run(directory, **choices)
    except UserError as error:
        print(error)
        return 2
    return 0


def assert_goes_on(processes, directory, undisturbed):
    processes.call(job, directory=directory, **CHOICES)
    assert facts(directory) == undisturbed[1]


@pytest.mark.parametrize(
    "where",
    ["write .*/log.jsonl", "rename .*/snapshots/0000002$", "write .*/.checkpoint", "rename .*/run/model.safetensors"],
    ids=["log", "snapshot", "checkpoint", "result"],
)
def test_a_run_that_is_killed_in_a_file_operation_ends_with_the_same_bits(processes, tmp_path, undisturbed, where):
    strike = FileStrike(tmp_path / "run", last(undisturbed[0], where))
    processes.call(job, expected=-9, strike=strike, directory=tmp_path / "run", **CHOICES)
    assert_goes_on(processes, tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("where", "error"),
    [("write .*/.checkpoint", errno.ENOSPC), ("write .*events", errno.ENOSPC), ("^1 ", errno.EROFS)],
    ids=["checkpoint", "tracker", "directory"],
)
def test_a_full_or_read_only_disk_is_said_and_loses_nothing(processes, tmp_path, undisturbed, where, error):
    strike = FileStrike(tmp_path / "run", last(undisturbed[0], where), error)
    output = processes.call(job, expected=2, strike=strike, directory=tmp_path / "run", **CHOICES)
    assert "Traceback" not in output
    assert {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system"}[error] in output
    assert_goes_on(processes, tmp_path / "run", undisturbed)


BUNDLED = str(Path(stagepatch.__file__).parent / "assets" / "digits-dit")


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--training.steps=1", "--training.batch_size=4"],
        ["sample", "--model=digits"],
        ["evaluate", "--model=digits"],
        ["evaluate", "digits", "digits"],
        ["merge", "--base=digits", f"--stages=[{BUNDLED}]", "--weights=[1]"],
        ["cache", "--model=latent"],
    ],
    ids=["train", "sample", "evaluate", "evaluate A B", "merge", "cache"],
)
def test_a_second_run_in_a_directory_is_refused(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("stagepatch.core.locks._PATIENCE", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latent" / "vae").mkdir(parents=True)
    (tmp_path / "latent" / "vae" / "config.json").write_text("{}")
    with alone_in(tmp_path / "run"):
        assert main([*command, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "Another process works in" in capsys.readouterr().err
    with alone_in(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_of_two_processes_one_is_killed_and_the_other_says_so(processes, tmp_path):
    strikes = {1: Strike("iteration", 3, "checkpoint.safetensors")}
    survivor, victim = processes.start_together(job, 2, strikes, directory=tmp_path / "run", **CHOICES)
    processes.finish(victim, -9)
    assert "Another process of this launch has ended" in processes.finish(survivor, 2)
    assert iteration_of(tmp_path / "run") in (2, 3)
    processes.call(job, directory=tmp_path / "run", **CHOICES)


def test_a_directory_that_disappears_stops_the_run_in_words(tmp_path, monkeypatch):
    advance = RunLog.advance
    monkeypatch.setattr(
        RunLog, "advance", lambda log: advance(log) or (log.done == 3 and shutil.rmtree(tmp_path / "run"))
    )
    with pytest.raises(UserError, match=r"Cannot write '.*log.jsonl': No such file or directory"):
        run(tmp_path / "run", **CHOICES)


def test_a_directory_on_another_file_system_and_a_clock_that_jumps(tmp_path, monkeypatch, undisturbed):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "run").symlink_to(elsewhere)
        now = iter(range(2_000_000_000, 0, -1_000_000))
        monkeypatch.setattr(time, "time", lambda: next(now))
        run(tmp_path / "run", **CHOICES)
        assert facts(tmp_path / "run") == undisturbed[1]
