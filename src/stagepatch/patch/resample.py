"""From one grid of positions to another."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.families.base import Grid


def resample(values: Tensor, grid: Grid) -> Tensor:
    """Values [..., *old grid] on another grid [..., *grid]: linear, antialiased where they grow fewer.

    A grid is height and width, or frames, height and width. The same grid gives the same tensor.
    """
    return _resample(values, values.ndim - len(grid), grid)


def resample_tokens(values: Tensor, old: Grid, grid: Grid) -> Tensor:
    """Values [..., N, D] of tokens in the order of a grid, on another grid."""
    if old == grid:
        return values
    by_position = values.unflatten(-2, old)
    return _resample(by_position, values.ndim - 2, grid).flatten(-len(grid) - 1, -2)


def _resample(values: Tensor, first: int, grid: Grid) -> Tensor:
    """Along one axis after another, from the first of the grid's on."""
    if values.shape[first : first + len(grid)] == grid:
        return values
    resampled = values.to(torch.promote_types(values.dtype, torch.float32))
    for axis, count in enumerate(grid, first):
        resampled = _resample_axis(resampled, axis, count)
    return resampled.to(values.dtype)


def _resample_axis(values: Tensor, axis: int, count: int) -> Tensor:
    """As a product with a small matrix: the result lies in memory as what it is added to does."""
    old = values.shape[axis]
    if old == count:
        return values
    each = torch.eye(old, dtype=values.dtype, device=values.device)
    weights = F.interpolate(each[None, None], (count, old), mode="bilinear", antialias=True)[0, 0]
    is_last = axis == values.ndim - 1
    resampled: Tensor = values @ weights.T if is_last else weights @ values.flatten(axis + 1)
    return resampled if is_last else resampled.unflatten(-1, values.shape[axis + 1 :])
