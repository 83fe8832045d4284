"""T timesteps cut into intervals whose members are near each other (interval clustering, ANT, arXiv 2306.00354).

Intervals are consecutive, none is empty, and the sum of their costs is the least there is. The cost of an interval is
the sum of its members' distances to the one in its middle (the later, where there are two). What the distance is makes
the three clusterings:

    timestep   |t − t'|; equal intervals are among the best, and are what the released code takes
    log-SNR    |log SNR(t) − log SNR(t')|; absolute differences are summed as in the released code
    gradient   − the cosine of the gradients at t and t', the paper's task affinity score
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from stagepatch.core import UserError
from stagepatch.diffusion.timesteps import log_snr


def timestep_distances(count: int) -> Tensor:
    """|t − t'| of timesteps 0 to count − 1, [T, T]."""
    return _differences(torch.arange(count, dtype=torch.float64))


def log_snr_distances(snr: Tensor) -> Tensor:
    """|log SNR(t) − log SNR(t')| of the SNR of every timestep, [T] -> [T, T]."""
    return _differences(log_snr(snr))


def gradient_distances(cosine: Tensor) -> Tensor:
    """− cosine of the gradients of n timesteps, [n, n], as `stagepatch analyze` writes it."""
    return -cosine.double()


def interval_costs(distances: Tensor) -> Tensor:
    """Cost of the interval from l to r, both of it, for all l ≤ r; infinite for others: [n, n] -> [n, n]."""
    first, last = torch.meshgrid(*[torch.arange(len(distances))] * 2, indexing="ij")
    middle = ((first + last + 1) // 2).clamp_max(len(distances) - 1)
    until = functional.pad(distances.double().cumsum(dim=1), (1, 0))
    return (until[middle, last + 1] - until[middle, first]).where(first <= last, torch.inf)


def cluster_intervals(distances: Tensor, count: int) -> list[tuple[int, int]]:
    """The `count` intervals [first, stop) of least cost, by dynamic programming.

    Args:
        distances: of every timestep (row) as an interval's middle to every other, [n, n].

    Raises:
        UserError: more intervals than timesteps, none, or a distance that is no number.
    """
    if not 1 <= count <= len(distances):
        raise UserError(f"{len(distances)} timesteps cannot be cut into {count} intervals.")
    if not distances.isfinite().all():
        raise UserError("Timesteps cannot be clustered by distances that are not finite.")
    costs = interval_costs(distances)
    best = costs[0]  # of timesteps 0 to r, in as many intervals as there are so far
    starts = []
    for _ in range(1, count):
        best, start = (best[:-1].unsqueeze(1) + costs[1:]).min(dim=0)
        starts.append(start + 1)
    edges = [len(distances)]
    for start in reversed(starts):
        edges.append(int(start[edges[-1] - 1]))
    edges = [0, *reversed(edges)]
    return list(itertools.pairwise(edges))


def _differences(values: Tensor) -> Tensor:
    return (values.unsqueeze(1) - values).abs()
