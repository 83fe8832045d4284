"""A search for the linear combination of a training's snapshots whose samples are best (LCSC, arXiv 2404.02241).

The paper's: weights of the snapshots that sum to one and may be negative, found by an evolutionary search on FID. Its
authors have not released their evolution. Ours: CMA-ES (arXiv 1604.00772), an evolution strategy, by cmaes, since on
quadratic functions it came nearer to the best than Optuna's NSGA-II of as many evaluations; it starts from the best of
the training's result, the snapshots' mean, and exponential averages of several rates; and weights are bounded.
"""

from collections.abc import Mapping

import numpy as np

from stagepatch.core import UserError
from stagepatch.search.config import SearchConfig
from stagepatch.search.engine import Evaluation, Point, Strategy

_RATES = np.linspace(0.1, 0.95, 8)
# CMA-ES's first standard deviation, as a share of the bounds' distance. Near snapshots are much alike, so that weights
# are many ways to nearly the same, and far from their averages there is little to find.
_SPREAD = 1 / 40


def lcsc(config: SearchConfig, count: int) -> Strategy:
    """The strategy for so many snapshots, in order of time, into whose training's result they are merged.

    A generation's points follow from the seed and the values of those before it, so that a search that was stopped
    goes on as it would have; processes share a generation.

    Raises:
        UserError: one snapshot, or fewer evaluations than it starts with.
    """
    starts = starting_points(count, config.high)
    if count < 2:
        raise UserError("The strategy 'lcsc' is for two snapshots or more; the one weight of one is found by 'grid'.")
    if config.evaluations <= len(starts):
        raise UserError(
            f"search.evaluations={config.evaluations} must be above {len(starts)}: the strategy 'lcsc' begins with "
            f"the result, the mean and {len(_RATES)} exponential averages."
        )

    def points(ended: Mapping[int, Evaluation], begun: Mapping[int, Point]) -> list[Point]:
        from cmaes import CMA

        named = list(starts)
        if any(slot not in ended for slot in range(len(starts))):
            return named
        best = starts[min(range(len(starts)), key=lambda slot: ended[slot].value)]
        bounds, spread = np.array([[config.low, config.high]] * count), (config.high - config.low) * _SPREAD
        generations = CMA(mean=np.array(best), sigma=spread, bounds=bounds, seed=config.seed)
        while len(named) < config.evaluations:
            slots = range(len(named), len(named) + generations.population_size)
            named += [tuple(map(float, generations.ask())) for _ in slots]
            if all(slot in ended for slot in slots):
                generations.tell([(np.array(ended[slot].point), ended[slot].value) for slot in slots])
            else:
                break
        return named[: config.evaluations]

    return Strategy("lcsc", {"seed": config.seed}, points, evaluations=config.evaluations)


def starting_points(count: int, high: float) -> list[Point]:
    """Weights of the snapshots: none, their mean, and exponential averages that the result is the last part of."""
    averages = []
    for rate in _RATES:
        weights = rate ** np.arange(count, 0, -1)
        averages.append(weights / (weights.sum() + 1.0))
    points = [np.zeros(count), np.full(count, 1.0 / count), *averages]
    return list(dict.fromkeys(tuple(float(min(weight, high)) for weight in point) for point in points))
