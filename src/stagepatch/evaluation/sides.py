"""Two sides, each models' samples, images or statistics, and the metrics of the one against the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagepatch.core import UserError
from stagepatch.evaluation.metrics import Collected, Metric, Split, chosen, measure_collected
from stagepatch.evaluation.shards import Shards
from stagepatch.evaluation.statistics import Statistics
from stagepatch.evaluation.uncertainty import measure_left_out

TWO_SIDED = ("fid", "kid", "precision", "recall")
"""Of the metrics that are measured where none are named."""

FEWEST = 4
"""Images that a side has at least: precision and recall look at the third nearest of the others."""


@dataclass
class Side:
    """What is known of one side.

    Args:
        name: as it was given.
        parts: what was collected of its images, a shard at a time; None of statistics alone.
        given: statistics of a file, by name, which then are taken in place of those of the images.
        facts: for the result.
    """

    name: str
    parts: Shards | None
    given: Mapping[str, Statistics] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Images that its statistics are of; 0 where their file does not say."""
        if self.given:
            return self.given["features"].count
        return 0 if self.parts is None else self.parts.count

    def statistics(self, name: str) -> Statistics | None:
        """Mean and covariance of what goes by a name, of which one shard is held at a time.

        Raises:
            UserError: numbers that are none.
        """
        if self.given or self.parts is None:
            return self.given.get(name)
        return Statistics.gathered(shard[name] for shard in self.parts)

    def collected(self, keys: Iterable[str]) -> dict[str, Collected]:
        """What metrics take: all rows where one needs them, else statistics, by name.

        Raises:
            UserError: too few images, or numbers that are none.
        """
        if self.parts is None:
            return dict(self.given)
        if self.parts.count < FEWEST:
            raise UserError(
                f"'{self.name}' has {self.parts.count} images: too few to measure, give at least {FEWEST}."
            )
        metrics = chosen(keys).values()
        whole = {metric.of for metric in metrics if not metric.moments}
        found: dict[str, Collected] = dict(self.parts.gathered({*whole, "captions"}))
        for name in {metric.of for metric in metrics} - whole:
            if name in self.parts.names() and (statistics := self.statistics(name)) is not None:
                found[name] = statistics
        return found


class Reference:
    """One side, for others to be measured against; what is needed of it is computed once.

    Args:
        keys: of METRICS.

    Raises:
        UserError: too few images, or features that are no numbers.
    """

    def __init__(self, side: Side, keys: Sequence[str]) -> None:
        self.keys = keys
        self._collected = side.collected(keys)
        self._statistics = dict(side.given)

    def measure(self, other: Side, with_intervals: bool) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics of the other side against this one, by key; those left out that need what there is not.

        Args:
            with_intervals: measure them without each of some groups of images too, see `measure_left_out`.

        Raises:
            UserError: too few images, features that are no numbers, or of another extractor.
        """
        collected = other.collected(self.keys)
        found = measure_collected(collected, self._of, self.keys)
        without = measure_left_out(collected, self._of, self.keys) if with_intervals else {}
        if other.given:
            own = measure_collected(other.given, self._of, self.keys)
            found, without = found | own, {key: each for key, each in without.items() if key not in own}
        return {key: found[key] for key in self.keys if key in found}, without

    def moments(self) -> Statistics | None:
        """Of the features, where a metric needed them."""
        return self._statistics.get("features")

    def _of(self, split: Split, metric: Metric) -> Collected | None:
        if split != "unseen":  # there is one other side, and nothing says whether the model was trained on it
            return None
        collected = self._collected.get(metric.of)
        if not metric.moments:
            return collected
        if metric.of not in self._statistics and collected is not None:
            of = collected if isinstance(collected, Statistics) else Statistics.of(collected)
            self._statistics[metric.of] = of
        return self._statistics.get(metric.of)
