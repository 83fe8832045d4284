"""The loss at each timestep, and what was learned against the base from the same images and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagepatch.analysis.samples import Samples, sample_losses
from stagepatch.diffusion import Objective


@dataclass
class Estimate:
    """A mean and its standard error, over draws of image and noise."""

    mean: float
    error: float


@torch.no_grad()
def loss_at_timesteps(
    model: nn.Module,
    objective: Objective,
    samples: Samples,
    timesteps: Sequence[int],
    count: int,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """The loss of every sample, [n, count] on the CPU: two calls with the same samples are paired number by number.

    Args:
        timesteps: [n].
        count: samples at a timestep.
        on_batch: called with the number of samples done.
    """
    model.eval()
    rows = []
    for timestep in timesteps:
        row = []
        for draws in samples.at(timestep, count, model, objective):
            row.append(sample_losses(model, objective, draws).double().cpu())
            if on_batch is not None:
                on_batch(len(draws.x_start))
        rows.append(torch.cat(row))
    return torch.stack(rows)


def estimate(losses: Tensor) -> Estimate:
    """Mean over timesteps [m, count], each of which counts alike; the error is of the draws at each."""
    if losses.shape[1] < 2:
        return Estimate(float(losses.mean()), math.nan)
    variances = losses.var(dim=1) / losses.shape[1]
    return Estimate(float(losses.mean()), float(variances.sum().sqrt()) / len(losses))


def difference(base: Tensor, other: Tensor) -> Estimate:
    """Mean of other − base, paired: [m, count] each."""
    return estimate(other - base)


def relative_difference(base: Tensor, other: Tensor) -> Estimate:
    """Mean of other − base over mean of base; the error of the ratio, to first order, from the paired residuals."""
    scale = float(base.mean())
    if scale == 0.0:
        return Estimate(math.nan, math.nan)
    ratio = float((other - base).mean()) / scale
    return Estimate(ratio, estimate(other - base - ratio * base).error / abs(scale))
