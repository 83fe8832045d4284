"""What commands share."""

import math
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from stagepatch.checkpoints import load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.core.processes import processes
from stagepatch.core.progress import progress_bar
from stagepatch.methods import DMP, Method, load_learned
from stagepatch.training import RUN_CONFIG as RUN_CONFIG


def say(text: str) -> None:
    """Print, in the main process alone."""
    if processes().is_main_process:
        print(text)


def load_on_device(name: str) -> tuple[nn.Module, Any]:
    """A denoiser on this process's device, and its scheduler."""
    model, scheduler = load_denoiser(name)
    return model.to(processes().device), scheduler


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
