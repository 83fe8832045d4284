"""What studies draw, and what they do while another process is at their work."""

import threading

import pytest
import yaml
from filelock import FileLock

from stagepatch.cli import main


def write_config(folder, **values):
    """The file of a study into `folder` / out, here and one job after another."""
    folder.mkdir(exist_ok=True)
    values = {"output_dir": str(folder / "out"), "launch": {"executor": "debug"}, **values}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def study(command, folder, *more, **values):
    return main([command, f"--config={write_config(folder, **values)}", *more])


@pytest.fixture
def unpictured(monkeypatch):
    """A comparison's page, which takes as long as its jobs here, is not drawn."""
    monkeypatch.setattr("stagepatch.report.write_page", lambda *_: None)


@pytest.fixture
def works_after_another(monkeypatch):
    """Whether a job works that another process has begun, and left when `at_its_end` was called."""

    def run(job, at_its_end=lambda: None):
        job.directory.mkdir(parents=True)
        worked = []
        monkeypatch.setattr(type(job), "work", lambda _: worked.append(1))
        waiting = threading.Thread(target=job.run)
        with FileLock(job.directory / "lock"):
            waiting.start()
            waiting.join(0.3)
            assert not worked
            at_its_end()
        waiting.join(10)
        assert not waiting.is_alive()
        return bool(worked)

    return run


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Gives a study to the command, which must refuse it before anything is launched; returns what it said."""

    def give(command, **values):
        monkeypatch.setattr(f"stagepatch.cli.{command}.launch", None)
        assert study(command, tmp_path, **values) == 2
        assert not (tmp_path / "out" / "jobs").exists()
        return capsys.readouterr().err

    return give
