"""Metrics on features, by torchmetrics where it has them."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


class _Given(nn.Module):
    """Stands where torchmetrics expects an extractor; the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance (arXiv 1706.08500) of Gaussians fitted to features [B, F] and reference [R, F]."""
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]), normalize=False).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kid(features: Tensor, reference: Tensor, subsets: int = 50) -> float:
    """Kernel distance (arXiv 1801.01401): unbiased, cubic kernel, mean over random subsets, always the same."""
    size = min(len(features), len(reference), 500)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which is so for any KID
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=_Given(features.shape[1]), subsets=subsets, subset_size=size)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, Eq. 1, 2).

    Precision: share of samples within the k-th-neighbour radius of some reference; recall: the reverse.
    """
    features, reference = features.double(), reference.double()
    precision = _share_inside(features, reference, _radii(reference, k))
    recall = _share_inside(reference, features, _radii(features, k))
    return precision, recall


def _radii(points: Tensor, k: int, rows: int = 1024) -> Tensor:
    """Distance of each point to its k-th nearest other point: [B]."""
    # The nearest of all is the point itself.
    parts = [torch.cdist(part, points).kthvalue(k + 1, dim=1).values for part in points.split(rows)]
    return torch.cat(parts)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int = 1024) -> float:
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(rows)]
    return float(torch.cat(inside).double().mean())


def nearest_distance(images: Tensor, reference: Tensor, rows: int = 1024) -> Tensor:
    """Euclidean distance in pixel values of each image to the nearest reference image: [B]."""
    flat = reference.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).amin(dim=1) for part in images.split(rows)])


def paired_difference(base: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of other − base over pairs, and its standard error (NaN for a single pair)."""
    differences = [after - before for before, after in zip(base, other, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))
