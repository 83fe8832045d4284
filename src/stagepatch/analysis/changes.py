"""Relative changes of a loss, with intervals over images."""

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats
from torch import Tensor

from stagepatch.analysis.losses import relative_difference

Answer = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Change:
    """A mean's change as a share of what it was, with its interval of 95%."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (100.0 * value for value in (self.mean, self.low, self.high))
        return f"{mean:+.2f} % ({low:+.2f} to {high:+.2f})"

    def is_below(self, limit: float) -> Answer:
        """Whether all of the interval, none of it, or a part is below the limit."""
        if math.isnan(self.low) or math.isnan(self.high):
            return "unclear"
        return "yes" if self.high < limit else "no" if self.low >= limit else "unclear"

    def is_above(self, limit: float) -> Answer:
        """See `is_below`."""
        return Change(-self.mean, -self.high, -self.low).is_below(-limit)


def change(base: Tensor, other: Tensor, weights: Tensor | None = None, comparisons: int = 1) -> Change:
    """Of the mean over timesteps and images, other against base; the unit is an image, whose timesteps go together.

    Args:
        base, other: losses [n, m] of n timesteps and m images each, compared image by image.
        weights: of the timesteps, [n]; all alike by default.
        comparisons: how many such changes are looked at: of all intervals together 95% hold (Bonferroni).
    """
    shares = base.new_ones(len(base)) if weights is None else weights.to(base)
    one, two = ((shares / shares.sum() @ losses).unsqueeze(0) for losses in (base, other))
    found, degrees = relative_difference(one, two), one.shape[1] - 1
    half = float(stats.t.ppf(1.0 - 0.025 / comparisons, degrees)) * found.error if degrees else math.nan
    return Change(found.mean, found.mean - half, found.mean + half)


def any_below(changes: list[Change], limit: float) -> Answer:
    """'yes' if one is, 'no' if none can be, else 'unclear'."""
    answers = [each.is_below(limit) for each in changes]
    return "yes" if "yes" in answers else "unclear" if "unclear" in answers or not answers else "no"
