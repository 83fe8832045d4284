"""What a step costs, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.evaluation import LatentSampling
from stagepatch.sampling import SamplingConfig, balanced_labels
from stagepatch.sampling.generate import conditions, guided


def median_seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each call's median time. The calls take turns, so that what slows the machine for a while slows all; one round
    before goes uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = _now()
            call()
            if number:
                seconds[name].append(_now() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def step_of(
    base: nn.Module,
    sampling: SamplingConfig,
    timestep: float,
    shape: tuple[int, int, int],
    latents: LatentSampling | None,
) -> Callable[[nn.Module], Tensor]:
    """A call of a model such as sampling's first batch makes at a step, guidance included.

    Args:
        base: its device and its conditions are the call's.
        shape: C, H, W of a sample.
        latents: how a model of latents is sampled.
    """
    indices = list(range(min(sampling.batch_size, sampling.num_images)))
    captions = None if latents is None else latents.captions
    labels = balanced_labels(base, len(indices))
    device: Any = next(base.parameters()).device
    condition, null = conditions(base, labels, captions, indices)
    sample = torch.randn(len(indices), *shape, generator=torch.Generator().manual_seed(0)).to(device)
    told = torch.tensor(timestep, device=device)

    @torch.no_grad()
    def step(model: nn.Module) -> Tensor:
        return guided(model, sample, told, condition, null, sampling)

    return step
