"""Records and pictures, in TensorBoard and accelerate's other trackers."""

import time
from typing import ClassVar

import numpy as np
import pytest
from accelerate import tracking
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.training import TrainingConfig
from stagepatch.training.trackers import check_trackers, name_of
from tests.runs import log_of, make_model, run


class Recorder(tracking.GeneralTracker):
    """Keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    made: ClassVar[list] = []

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.settings, self.logged, self.images, self.is_done = (
            project,
            options,
            {},
            [],
            {},
            0,
        )
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **options):
        self.logged.append({"iteration": step, **values})

    def log_images(self, values, step=None, **options):
        self.images |= {(name, step): images for name, images in values.items()}

    def finish(self):
        self.is_done += 1


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


class Picture:
    """A check that shows a picture."""

    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))

    def is_due(self, done, steps):
        return done == 2

    def __call__(self, model, done, log):
        log.show("validation", self.picture, done)


def test_a_tracker_has_what_the_log_has_the_settings_and_pictures(tmp_path, recorder):
    options = {"trackers": ["recorder", "recorder"], "tracker_project_name": "flowers", "log_every": 2, "steps": 3}
    run(tmp_path, identity={"data": "here"}, checks=[Picture()], **options)
    (made,) = recorder
    assert made.project == "flowers"
    assert made.settings["data"] == "here"
    assert made.settings["training"]["log_every"] == 2
    assert made.logged == log_of(tmp_path)
    assert list(made.images) == [("validation", 2)]
    assert np.array_equal(made.images["validation", 2], np.asarray(Picture.picture)[None])
    assert made.is_done == 1


def test_a_tracker_ends_when_a_run_stops(tmp_path, recorder):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, trackers=["recorder"], checks=[type("Stop", (Picture,), {"__call__": lambda *_: 1 / 0})()])
    assert recorder[0].is_done == 1


def test_tensorboard_has_losses_and_pictures_and_drops_what_is_repeated(tmp_path):
    for steps in (4, 3):  # the second goes on from 0: its checkpoint is not there
        time.sleep(1.1)  # files are read in the order of their names, which have whole seconds
        (tmp_path / "checkpoint.safetensors").unlink(missing_ok=True)
        run(tmp_path, steps=steps, tensorboard=True, checks=[Picture()])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    found = {event.step: event.value for event in events.Scalars("grad_norm")}
    assert found == pytest.approx({record["iteration"]: record["grad_norm"] for record in log_of(tmp_path)})
    image = events.Images("validation")[-1]
    assert (image.step, image.height, image.width) == (2, 4, 5)


def test_trackers_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"training\.trackers=\['wandb'\] needs wandb: pip install wandb$"):
        run(tmp_path, trackers=["wandb"])
    with pytest.raises(UserError, match=r"training\.trackers has 'wandbd', which is none of .*, trackio, wandb\."):
        check_trackers(TrainingConfig(trackers=["wandbd"]))
    assert main(["train", f"--output_dir={tmp_path}", "--training.trackers=[trackio]", "--data.source=nowhere"]) == 2
    assert "training.trackers=['trackio'] needs trackio: pip install trackio" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))


def test_one_that_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setitem(
        tracking.LOGGER_TYPE_TO_CLASS, "recorder", type("Locked", (Recorder,), {"start": lambda _: 1 / 0})
    )
    with pytest.raises(UserError, match="The tracker 'recorder' does not begin: division by zero"):
        run(tmp_path, trackers=["recorder"])


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path / "run", steps=2, trackers=["wandb"], checks=[Picture()], model=make_model())
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    (picture,) = folder.rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(Picture.picture))


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    run(tmp_path / "run", steps=2, trackers=["trackio"], checks=[Picture()])
    (kept,) = trackio.Api().runs("stagepatch")
    assert kept.name == name_of(tmp_path / "run") == str(tmp_path / "run")[1:].replace("/", "-")
    (picture,) = (tmp_path / "trackio" / "media").rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(Picture.picture))
