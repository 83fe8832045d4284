"""How sure a value is that *any* sample may decide, such as recall: from halves of the samples, not by leaving out.

What happens without a group counts what several samples do together as often as there are of them (Efron & Stein, "The
jackknife estimate of variance", 1981), so that intervals are too wide (docs/metrics.md has figures). Two halves are
independent sets: the square of their difference is on average twice the variance of either.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS = 20


def without_by_halves(
    gaps: Callable[[Tensor, Tensor, Tensor], Tensor], features: Tensor, reference: Tensor, groups: Tensor
) -> list[float]:
    """What a value would be without each group of samples, to first order and less a constant, [20].

    The groups make two halves in 19 ways, balanced over all pairs of groups (McCarthy, "Pseudo-replication: half
    samples", 1969), so that of a mean over the samples it is just the mean without each group. Each two halves are
    against one half of the reference, and near to as much of it as the whole is: then the variance falls as 1/N, and
    that of a half is twice that of the whole.

    Args:
        gaps: of samples [B, F], reference [R, F] and halves [19, B]: how much higher the value of one half is than
            that of the other, of every second pair of halves against every second reference, [19].

    Returns:
        NaN of other than 20 groups, and of less than two references.
    """
    count = int(groups.max()) + 1
    if count != GROUPS or len(reference) < 2:
        return [math.nan] * count
    halves = balanced_halves()
    found = gaps(features, reference, halves[:, groups])
    without: list[float] = (found @ (0.5 - halves.double()) / len(halves)).tolist()
    return without


def spread_by(variance: float, without: list[float]) -> list[float]:
    """Values without each group, so far from their mean that the jackknife gives a variance; where that is not above 0
    the same ones.
    """
    values = torch.tensor(without).double()
    around = values - values.mean()
    own = float((around**2).sum()) * (len(without) - 1) / len(without)
    if not (own > 0.0 and variance > 0.0):
        return without
    spread: list[float] = (values.mean() + around * math.sqrt(variance / own)).tolist()
    return spread


def balanced_halves() -> Tensor:
    """Whether each group is in the first half, [19, 20]: Paley's Hadamard matrix, by squares modulo 19."""
    numbers = torch.arange(GROUPS - 1)
    squares = torch.isin((numbers - numbers.unsqueeze(1)) % len(numbers), numbers[1:] ** 2 % len(numbers))
    return F.pad(squares, (0, 1), value=True)
