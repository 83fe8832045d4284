"""What commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress
from torch import nn

from stagepatch.checkpoints import load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.core.processes import processes
from stagepatch.core.progress import progress_bar
from stagepatch.methods import DMP, Method, load_learned
from stagepatch.studies import LaunchConfig, launch

J = TypeVar("J")
RUN_CONFIG = "run.yaml"


def say(text: str) -> None:
    """Print, in the main process alone."""
    if processes().is_main_process:
        print(text)


def load_on_device(name: str) -> tuple[nn.Module, Any]:
    """A denoiser on this process's device, and its scheduler."""
    model, scheduler = load_denoiser(name)
    return model.to(processes().device), scheduler


def run_jobs(
    run: Callable[[J], None],
    jobs: Sequence[J],
    is_done: Callable[[J], bool],
    config: LaunchConfig,
    logs: Path,
    what: str = "jobs",
) -> None:
    """Launch those of some jobs that are not done, with a bar over all.

    Args:
        what: they are, for messages.
    """
    left = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs)} {what}, {len(jobs) - len(left)} of them done; logs in '{logs}'.")
    with progress_bar() as progress:
        task = progress.add_task(what, total=len(jobs), completed=len(jobs) - len(left), status="")

        def on_done(job: J) -> None:
            progress.advance(task)
            progress.console.print(f"done: {job}", highlight=False)

        launch(run, left, config, logs, on_done)


def sampling_bar() -> Progress:
    """A progress bar, shown by the main process alone."""
    return progress_bar(disable=not processes().is_main_process)


def own_share(num_images: int) -> int:
    """Images that the main process makes, for its bar."""
    return math.ceil(num_images / int(processes().num_processes))


def put_on(directory: str, scale: float, model: nn.Module) -> Method:
    """What a method learned, on a model; scaled, if it is a patch."""
    method = load_learned(model, Path(directory))
    if isinstance(method, DMP):
        method.patch.scale = scale
    elif scale != 1.0:
        raise UserError(f"patch_scale={scale} scales a patch; '{directory}' holds what {method.name} learned.")
    return method
