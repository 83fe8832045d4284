"""FID at infinitely many samples (arXiv 1911.07023)."""

import numpy as np
import torch
from torch import Tensor

from stagepatch.evaluation.statistics import Statistics, frechet_distance

_POINTS, _ROWS = 15, 2048


def fid_infinity(features: Tensor, reference: Tensor | Statistics) -> float:
    """FID extrapolated to infinitely many samples: the value at 1/N = 0 of a line through FIDs of N of them.

    FID of N samples is too high by a multiple of 1/N, and by another multiple for another model. 15 random subsets,
    always the same, from a tenth of the samples (of more than there are dimensions, where there are so many) to all.
    The reference's own share of the excess stays.

    Args:
        features: [B, F].
        reference: [R, F], or statistics.

    Raises:
        UserError: of different F, or features that are no numbers.
    """
    other = reference if isinstance(reference, Statistics) else Statistics.of(reference)
    total, dimensions = len(features), features.shape[1]
    fewest = min(max(total // 10, dimensions + 1, 2), max(total // 2, 2))
    generator = torch.Generator().manual_seed(0)
    sizes = np.linspace(fewest, total, _POINTS).round().astype(int)
    subsets = [torch.randperm(total, generator=generator)[: int(size)] for size in sizes]
    values = []
    for subset in subsets:  # a part at a time, so that the features are not held twice
        values.append(frechet_distance(Statistics.gathered(features[part] for part in subset.split(_ROWS)), other))
    return float(np.polynomial.polynomial.polyfit(1.0 / sizes, values, 1)[0])
