"""Two sides, each models' samples, images or statistics, and the metrics of the one against the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stagepatch.core import UserError
from stagepatch.evaluation.metrics import METRICS, Collected, Metric, Split, measure_collected
from stagepatch.evaluation.shards import Shards
from stagepatch.evaluation.statistics import Statistics

FEWEST = 4
"""Images that a side has at least: precision and recall look at the third nearest of the others."""


@dataclass
class Side:
    """What is known of one side.

    Args:
        name: as it was given.
        parts: features of its images, a shard at a time; None of statistics alone.
        given: statistics of a file, which then are taken in place of those of the images.
        facts: for the result.
    """

    name: str
    parts: Shards | None
    given: Statistics | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Images that its statistics are of; 0 where their file does not say."""
        if self.given is not None:
            return self.given.count
        return 0 if self.parts is None else self.parts.count

    def statistics(self) -> Statistics:
        """Mean and covariance of the features, of which one shard is held at a time.

        Raises:
            UserError: features that are no numbers, or of a single image.
        """
        if self.given is not None:
            return self.given
        assert self.parts is not None
        return Statistics.gathered(shard["features"] for shard in self.parts)

    def collected(self) -> dict[str, Tensor]:
        """Features of all images, by the names that metrics know; nothing of statistics alone."""
        return {} if self.parts is None else self.parts.gathered()


class Reference:
    """One side, for others to be measured against; what is needed of it is computed once.

    Raises:
        UserError: too few images.
    """

    def __init__(self, side: Side) -> None:
        check_enough(side)
        self.side = side
        self._collected = side.collected()
        self.statistics = side.given or Statistics.of(self._collected["features"])

    def measure(self, other: Side) -> dict[str, float]:
        """Metrics of the other side against this one, by key; those left out that need more than statistics.

        Raises:
            UserError: too few images, features that are no numbers, or of another extractor.
        """
        check_enough(other)
        keys = two_sided()
        found = measure_collected(other.collected(), self._of, keys)
        if other.given is not None:
            found |= measure_collected({"features": other.given}, self._of, keys)
        return {key: found[key] for key in keys if key in found}

    def _of(self, split: Split, metric: Metric) -> Collected | None:
        is_enough = metric.moments and metric.of == "features"
        return self.statistics if is_enough else self._collected.get(metric.of)


def two_sided() -> list[str]:
    """Keys of the metrics that compare one set of images with another, whatever these are."""
    return [key for key, metric in METRICS.items() if metric.references == ("unseen",) and metric.of == "features"]


def check_enough(side: Side) -> None:
    """Refuse a side of too few images.

    Raises:
        UserError: fewer than FEWEST.
    """
    if side.parts is not None and side.parts.count < FEWEST:
        raise UserError(f"'{side.name}' has {side.parts.count} images: too few to measure, give at least {FEWEST}.")
