"""From one grid of positions to another."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.families.base import Grid


def resample(values: Tensor, grid: Grid) -> Tensor:
    """Values [..., *old grid] on another grid [..., *grid]: linear, antialiased where they grow fewer.

    A grid is height and width, or frames, height and width. The same grid gives the same tensor.
    """
    if tuple(values.shape[-len(grid) :]) == grid:
        return values
    leading, old = values.shape[: -len(grid)], values.shape[-len(grid) :]
    # Channels are one to a row of the batch; frames are resampled after their pictures.
    pictures = values.reshape(1, -1, *old[-2:]).to(torch.promote_types(values.dtype, torch.float32))
    pictures = F.interpolate(pictures, grid[-2:], mode="bilinear", antialias=True)
    if len(grid) == 3:
        frames = pictures.view(1, math.prod(leading), old[0], grid[1] * grid[2])
        pictures = F.interpolate(frames, (grid[0], grid[1] * grid[2]), mode="bilinear", antialias=True)
    return pictures.reshape(*leading, *grid).to(values.dtype)


def resample_tokens(values: Tensor, old: Grid, grid: Grid) -> Tensor:
    """Values [..., N, D] of tokens in the order of a grid, on another grid."""
    if old == grid:
        return values
    by_position = values.transpose(-1, -2).unflatten(-1, old)
    return resample(by_position, grid).flatten(-len(grid)).transpose(-1, -2)
