"""Averages of a training whose length is chosen after it (post-hoc EMA, arXiv 2312.02696, Section 3 and its appendix).

A power-function average at step T weighs the weights of step t by (γ + 1) t^γ / T^(γ + 1). Its length is σ_rel, the
standard deviation of that profile as a share of T. Time is counted in steps where the paper counts images: only ratios
of times enter, and a run's batch size does not change.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stagepatch.core import UserError

# The greatest σ_rel: of γ = 0, the plain mean.
_LONGEST = 12**-0.5
_Numbers = np.ndarray | np.float64


def relative_std(gamma: float) -> float:
    """σ_rel of a power-function profile (Eq. 123)."""
    return math.sqrt((gamma + 1.0) / (gamma + 2.0) ** 2 / (gamma + 3.0))


def power_of(sigma_rel: float) -> float:
    """γ of a profile with this σ_rel: the largest root of (γ + 2)² (γ + 3) = (γ + 1) / σ_rel² (Algorithm 2).

    Raises:
        UserError: σ_rel is not above 0 and below 12^(−1/2), which is γ = 0, the plain mean.
    """
    if not 0.0 < sigma_rel < _LONGEST:
        raise UserError(
            f"A post-hoc EMA's sigma_rel={sigma_rel} must be above 0 and below {_LONGEST:.4f}, the plain mean; the "
            f"paper keeps averages of 0.05 and 0.1."
        )
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def posthoc_weights(
    steps: Sequence[int], sigmas: Sequence[float], step: int, sigma_rel: float
) -> tuple[list[float], float]:
    """What to weigh saved averages by, so that their sum is near the average of another σ_rel.

    The profiles' weighted sum is nearest to the wanted profile in the mean square (Algorithm 3), and then scaled, as
    in the authors' code, so that the weights sum to one. Two profiles' inner product has a closed form (Eq. 151).

    Args:
        steps: of each saved average.
        sigmas: their σ_rel.
        step: of the wanted average.

    Returns:
        The weights; and how far the profile that they make is from the wanted one: the norm of their difference over
        the latter's.

    Raises:
        UserError: a σ_rel that cannot be.
    """
    times, powers = np.array(steps, dtype=np.float64), np.array([power_of(each) for each in sigmas])
    time, power = np.float64(step), np.float64(power_of(sigma_rel))
    saved = _inner(times[:, None], powers[:, None], times, powers)
    wanted = _inner(times, powers, time, power)
    weights = np.linalg.lstsq(saved, wanted, rcond=None)[0]
    weights /= weights.sum()
    norm = _inner(time, power, time, power)
    square = float((weights @ saved @ weights - 2 * weights @ wanted + norm) / norm)
    return weights.tolist(), math.sqrt(max(square, 0.0))


def _inner(time: _Numbers, power: _Numbers, other_time: _Numbers, other: _Numbers) -> np.ndarray:
    """∫ p(t) q(t) dt of two profiles, by their times and powers; all broadcast."""
    ratio = np.where(time < other_time, (time / other_time) ** other, (other_time / time) ** power)
    product: np.ndarray = (power + 1) * (other + 1) * ratio / ((power + other + 1) * np.maximum(time, other_time))
    return product


class PowerAverages:
    """Power-function averages of what is trained, one for each σ_rel; a training without them has none.

    At the end of step T each is Σ w_t θ_t, w_t = (t^(γ+1) − (t − 1)^(γ+1)) / T^(γ+1): the profile's integral over the
    step that ends in t. What was before the first step has no part in it.

    Attributes:
        averages: by σ_rel, in the parameters' order.

    Raises:
        UserError: a σ_rel that cannot be.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sigmas: Sequence[float]) -> None:
        self._parameters = parameters
        self._powers = {sigma: power_of(sigma) for sigma in sigmas}
        self.averages = {sigma: [value.detach().clone() for value in parameters] for sigma in sigmas}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """At the end of a step, which are counted from 1 (Eq. 127)."""
        for sigma, average in self.averages.items():
            decay = (1.0 - 1.0 / step) ** (self._powers[sigma] + 1.0)
            torch._foreach_lerp_(average, list(self._parameters), 1.0 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by their names in a checkpoint."""
        return {
            f"posthoc_ema.{sigma}.{index}": value
            for sigma, average in self.averages.items()
            for index, value in enumerate(average)
        }
