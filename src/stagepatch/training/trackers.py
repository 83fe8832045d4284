"""Where else a run's records and pictures go: TensorBoard, wandb, trackio and others, by accelerate's trackers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import tracking
from accelerate.utils import LoggerType
from PIL import Image

from stagepatch.core import UserError, as_json, as_user_error
from stagepatch.training.config import TrainingConfig

_TENSORBOARD = "tensorboard"


def check_trackers(config: TrainingConfig) -> list[str]:
    """The names of a run's trackers.

    Raises:
        UserError: accelerate knows none of that name, or its library is not installed.
    """
    names = list(dict.fromkeys([*[_TENSORBOARD] * config.tensorboard, *config.trackers]))
    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
            raise UserError(f"training.trackers has '{name}', which is none of {known}.")
        if name in LoggerType.list() and name not in map(str, tracking.get_available_trackers()):
            raise UserError(f"training.trackers={config.trackers} needs {name}: pip install {name}")
    return names


def open_trackers(
    config: TrainingConfig, directory: Path, start: int, settings: Mapping[str, Any]
) -> list[tracking.GeneralTracker]:
    """A run's trackers, begun; for the main process.

    Args:
        directory: of the run, which is called by it.
        start: iteration that it goes on from.
        settings: that trackers show beside it.

    Raises:
        UserError: see `check_trackers`; or one that does not begin, as for want of a login.
    """
    options: dict[str, dict[str, Any]] = {
        _TENSORBOARD: {"purge_step": start + 1},
        "wandb": {"name": name_of(directory), "dir": str(directory)},
        "trackio": {"name": name_of(directory), "resume": "allow"},
    }
    opened = []
    for name in check_trackers(config):
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        where = [str(directory)] if kind.requires_logging_directory else []
        # TensorBoard's files lie in a folder of the run that is called by what it takes for the project.
        project = _TENSORBOARD if name == _TENSORBOARD else config.tracker_project_name
        with as_user_error(f"The tracker '{name}' does not begin", Exception):
            tracker = kind(project, *where, **options.get(name, {}))
            tracker.start()
            if name != _TENSORBOARD:  # which makes another run of them
                tracker.store_init_configuration(as_json(settings))
        opened.append(tracker)
    return opened


def name_of(directory: Path) -> str:
    """What trackers call a run: its directory, as one word, since trackio makes paths of it."""
    return "-".join(part for part in directory.parts if part != directory.anchor)


def log_picture(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    """A picture, where a tracker takes some."""
    pixels = np.asarray(picture)
    if tracker.name == "trackio":  # accelerate does not know that it does
        import trackio

        tracker.log({name: trackio.Image(pixels)}, step=step)
    elif hasattr(tracker, "log_images"):
        options = {"dataformats": "NHWC"} if tracker.name == _TENSORBOARD else {}
        tracker.log_images({name: pixels[None]}, step=step, **options)
