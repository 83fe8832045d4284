"""A search for the linear combination of a training's snapshots whose samples are best (LCSC, arXiv 2404.02241).

The paper's: weights of the snapshots that sum to one and may be negative, found by an evolutionary search on FID. Its
authors have not released their evolution. Ours: CMA-ES, an evolution strategy, by Optuna and cmaes, since on quadratic
functions it came nearer to the best than Optuna's NSGA-II of as many evaluations; it starts from the best of the
training's result, the snapshots' mean, and exponential averages of several rates; and weights are bounded.
"""

from typing import Any

import numpy as np
import optuna
from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial, TrialState

from stagepatch.core import UserError
from stagepatch.search.config import SearchConfig
from stagepatch.search.engine import Point, Strategy

_RATES = np.linspace(0.1, 0.95, 8)
# CMA-ES's first standard deviation, as a share of the bounds' distance. Near snapshots are much alike, so that weights
# are many ways to nearly the same, and far from their averages there is little to find.
_SPREAD = 1 / 40


def lcsc(config: SearchConfig, count: int) -> Strategy:
    """The strategy for so many snapshots, in order of time, into whose training's result they are merged.

    Raises:
        UserError: fewer evaluations than it starts with.
    """
    starts = starting_points(count, config.high)
    if config.evaluations <= len(starts):
        raise UserError(
            f"search.evaluations={config.evaluations} must be above {len(starts)}: the strategy 'lcsc' begins with "
            f"the result, the mean and {len(_RATES)} exponential averages."
        )
    points = [*starts, *[None] * (config.evaluations - len(starts))]
    sampler = _FromBest(len(starts), config.seed, (config.high - config.low) * _SPREAD)
    return Strategy("lcsc", {"seed": config.seed}, lambda ended, begun: points, sampler)


def starting_points(count: int, high: float) -> list[Point]:
    """Weights of the snapshots: none, their mean, and exponential averages that the result is the last part of."""
    averages = []
    for rate in _RATES:
        weights = rate ** np.arange(count, 0, -1)
        averages.append(weights / (weights.sum() + 1.0))
    points = [np.zeros(count), np.full(count, 1.0 / count), *averages]
    return list(dict.fromkeys(tuple(float(min(weight, high)) for weight in point) for point in points))


class _FromBest(CmaEsSampler):
    """CMA-ES that begins at the best of the first evaluations. It is made anew, as `_seeded` samplers are."""

    def __init__(self, starts: int, seed: int, sigma: float) -> None:
        super().__init__(seed=seed, sigma0=sigma)
        self._starts, self._number, self._spread = starts, seed, sigma

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        options: dict[str, Any] = {"n_startup_trials": len(ended) + 1}  # none of the first is the sampler's
        if trial.user_attrs.get("slot", 0) >= self._starts and ended:
            options = {"x0": min(ended, key=lambda one: one.value or 0.0).params, "n_startup_trials": 1}
        seed = (1_000_003 * self._number + trial.number) % 2**32
        super().__init__(seed=seed, sigma0=self._spread, **options)
        super().before_trial(study, trial)
