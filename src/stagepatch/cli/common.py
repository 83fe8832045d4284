"""What commands share."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagepatch.checkpoints import MemoryConfig, load_denoiser, on_device
from stagepatch.cli.config import EvaluateConfig, SampleConfig
from stagepatch.core import UserError, processes, progress_bar, read_yaml
from stagepatch.diffusion import make_sampler, pin_timesteps
from stagepatch.families import find_denoiser
from stagepatch.methods import DMP, LoRA, PerDenoiser, open_learned
from stagepatch.sampling import SamplingConfig, load_experts, load_limited_loras
from stagepatch.training import RUN_CONFIG as RUN_CONFIG
from stagepatch.training import write_run_config as write_run_config


def say(text: str) -> None:
    """Print, in the main process alone."""
    if processes().is_main_process:
        print(text)


def load_on_device(
    name: str, dtype: torch.dtype = torch.float32, memory: MemoryConfig | None = None
) -> tuple[nn.Module, Any]:
    """A denoiser on this process's device, and its scheduler."""
    model, scheduler = load_denoiser(name, dtype, memory=memory)
    return on_device(model, processes().device), scheduler


@contextmanager
def bar_over(total: int, description: str = "sampling") -> Iterator[Callable[[int], None]]:
    """A progress bar, shown by the main process alone; yields what to call with the number that is done more."""
    with progress_bar(disable=not processes().is_main_process) as progress:
        yield partial(progress.advance, progress.add_task(description, total=total, status=""))


def own_share(num_images: int) -> int:
    """Images that the main process makes, for its bar."""
    return math.ceil(num_images / int(processes().num_processes))


def put_on(directory: str, scale: float, target: Any, component: str = "") -> None:
    """What a method learned, on a model or a pipeline, for sampling; scaled, if it is a patch, fused, if it is a LoRA.

    Args:
        component: the denoiser's name, in a pipeline that has several.
    """
    put = open_learned(Path(directory)).put_on(target, component)
    for method in put.methods.values() if isinstance(put, PerDenoiser) else [put]:
        if isinstance(method, DMP):
            method.patch.scale = scale
        elif scale != 1.0:
            raise UserError(f"patch_scale={scale} scales a patch; '{directory}' holds what {method.name} learned.")
        if isinstance(method, LoRA):
            method.fuse()


def check_scale(config: SampleConfig | EvaluateConfig) -> None:
    """See that what is put on a schedule's experts is so as it was learned.

    Raises:
        UserError: it is scaled.
    """
    if config.schedule and config.patch_scale != 1.0:
        raise UserError(f"patch_scale={config.patch_scale} scales a patch on one model: leave it out with --schedule.")


def put_experts_on(
    schedule: str, target: Any, scheduler: Any, sampling: SamplingConfig, component: str = "", learned: str = ""
) -> SamplingConfig:
    """A file's experts, or its LoRAs by range, on a denoiser or on a pipeline's; returns how it is to be sampled.

    Args:
        learned: directory of what is put on each expert.
    """
    content = read_yaml(Path(schedule), "schedule")
    if isinstance(content, dict) and "loras" in content:
        if learned:
            raise UserError(f"'{schedule}' has LoRAs on the model itself: give them, or '{learned}'.")
        load_limited_loras(schedule, target, component)
        return sampling
    experts = load_experts(schedule, find_denoiser(target), scheduler or target.scheduler, learned)
    experts.attach(target)
    if scheduler is None and experts.timesteps is not None:
        if experts.scheduler:
            target.scheduler = make_sampler(experts.scheduler, target.scheduler)
        pin_timesteps(target.scheduler, experts.timesteps)
    return experts.sampling(sampling)
