"""Mean and covariance of features, gathered a batch at a time, and the Fréchet distance of two of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stagepatch.core import UserError

_ROWS = 2048


@dataclass
class Statistics:
    """Of a set of features.

    Args:
        count: of rows; 0 where a file does not say.
        mean: [F], float64.
        covariance: [F, F], float64, divided by count − 1.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features [B, F], B ≥ 2.

        Raises:
            UserError: some are no numbers.
        """
        return cls.gathered(features.split(_ROWS))

    @classmethod
    def gathered(cls, batches: Iterable[Tensor]) -> Statistics:
        """Of batches [B, F], of which one is held at a time."""
        running = RunningStatistics()
        for batch in batches:
            running.update(batch)
        return running.statistics()

    def note(self) -> str:
        """What so few images do to a Fréchet distance; empty where there are more of them than dimensions."""
        dimensions = len(self.mean)
        if not 0 < self.count <= dimensions:
            return ""
        return (
            f"{self.count:,} images for {dimensions:,} dimensions: the covariance is singular, and a Fréchet distance "
            f"is too high by an amount that depends on how many there are. Compare only distances of equally many."
        )


class RunningStatistics:
    """What `Statistics` are of, so far: fed by batches, merged with what another process gathered.

    Sums of squares are taken about the mean so far (Chan, Golub and LeVeque 1979), in float64, so a large common
    offset costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean, self._scatter = torch.zeros(0), torch.zeros(0)

    def update(self, features: Tensor) -> None:
        """Take in a batch [B, F].

        Raises:
            UserError: numbers that are none, or another F than before.
        """
        if not len(features):
            return
        check_finite(features)
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.mT @ centred)

    def merge(self, other: RunningStatistics) -> None:
        """Take in what another gathered.

        Raises:
            UserError: it is of another F.
        """
        if other.count:
            self._merge(other.count, other._mean, other._scatter)

    def without(self, part: RunningStatistics) -> Statistics:
        """Of all so far but a part of it.

        Raises:
            UserError: fewer than two rows.
        """
        rest = RunningStatistics()
        rest.merge(self)
        rest._merge(-part.count, part._mean, -part._scatter)
        return rest.statistics()

    def statistics(self) -> Statistics:
        """Of all so far.

        Raises:
            UserError: fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"A covariance takes at least 2 images, not {self.count}.")
        return Statistics(self.count, self._mean, self._scatter / (self.count - 1))

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        check_dimensions(len(self._mean), len(mean))
        total, apart = self.count + count, mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(apart, apart, alpha=self.count * count / total)
        self._mean = self._mean + apart * (count / total)
        self.count = total


def check_finite(features: Tensor) -> None:
    """Refuse what is no number.

    Raises:
        UserError: how many rows of features [B, ...] hold NaN or infinity.
    """
    broken = int((~features.flatten(1).isfinite()).any(dim=1).sum()) if features.numel() else 0
    if broken:
        raise UserError(
            f"The features of {broken:,} of {len(features):,} images are no numbers (NaN or infinite), so nothing can "
            f"be measured: look at these images; a model that diverged makes such, and so does float16 overflow."
        )


def check_dimensions(one: int, other: int) -> None:
    """Refuse to compare features of different lengths.

    Raises:
        UserError: they differ.
    """
    if one != other:
        raise UserError(
            f"Features of {one:,} dimensions cannot be compared with those of {other:,}: both sets must be measured "
            f"with the same extractor."
        )


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Fréchet distance of two Gaussians (arXiv 1706.08500): |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁C₂)^½).

    With C₁ = RRᵀ, the eigenvalues of C₁C₂ other than zero are those of RᵀC₂R, which is symmetric. R is Cholesky's
    factor, or, of a singular C₁ (fewer images than dimensions, features that are always 0), that of its eigenvectors.

    Raises:
        UserError: they are of different dimensions.
    """
    check_dimensions(len(one.mean), len(other.mean))
    if _rank(other) < _rank(one):  # the smaller problem of the two
        one, other = other, one
    root = _root(one)
    eigenvalues = torch.linalg.eigvalsh(root.mT @ other.covariance @ root)
    means = (one.mean - other.mean).square().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    distance = means + traces - 2.0 * eigenvalues.clamp(min=0.0).sqrt().sum()
    return max(0.0, float(distance))  # of two alike, rounding may leave a little less than none


def _rank(statistics: Statistics) -> int:
    """What it is at most."""
    dimensions = len(statistics.mean)
    return min(dimensions, statistics.count - 1) if statistics.count else dimensions


def _root(statistics: Statistics) -> Tensor:
    """R [F, rank], where the covariance is RRᵀ."""
    covariance = statistics.covariance
    if _rank(statistics) == len(covariance):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) == 0:
            return factor
    values: Tensor
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0.0) * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root
