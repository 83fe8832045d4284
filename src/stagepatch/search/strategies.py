"""What a search for weights evaluates: a grid of two levels (DeMe, arXiv 2410.06664, supplement), TPE, CMA-ES."""

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, TPESampler
from optuna.trial import FrozenTrial

from stagepatch.core.errors import UserError
from stagepatch.search.config import SearchConfig
from stagepatch.search.engine import Evaluation, Point, Strategy

NAMES = ("grid", "tpe", "cma")


def weight_strategies(config: SearchConfig, count: int) -> list[Strategy]:
    """The strategies of a config, each beginning with the base and the mean.

    Args:
        count: number of weights.

    Raises:
        UserError: settings that cannot be, by name.
    """
    unknown = [name for name in config.strategies if name not in NAMES]
    if unknown or len(set(config.strategies)) < len(config.strategies):
        raise UserError(f"search.strategies={config.strategies} must be some of {', '.join(NAMES)}, once each.")
    if not config.low <= 0.0 < config.high:
        raise UserError(f"search.low={config.low} and high={config.high} must have low ≤ 0 < high: 0 is the base.")
    if not all(config.low <= weight <= config.high for weight in config.coarse):
        raise UserError(f"search.coarse={config.coarse} must be within low={config.low} and high={config.high}.")
    starts: list[Point] = [(0.0,) * count, (min(1.0 / count, config.high),) * count]
    if config.evaluations < len(starts):
        raise UserError(f"search.evaluations={config.evaluations} must be 2 or more: the base and the mean are two.")
    if "cma" in config.strategies and importlib.util.find_spec("cmaes") is None:
        raise UserError("The strategy 'cma' needs cmaes: pip install 'stagepatch[search]'.")
    bounds = {"low": config.low, "high": config.high}
    points = [*starts, *[None] * (config.evaluations - len(starts))]
    samplers = {
        "tpe": _seeded(TPESampler, config.seed, multivariate=True, constant_liar=True),
        "cma": _seeded(CmaEsSampler, config.seed),
    }
    return [
        _grid(config, starts, bounds)
        if name == "grid"
        else Strategy(name, {**bounds, "seed": config.seed}, lambda ended, begun: points, samplers[name])
        for name in config.strategies
    ]


def _grid(config: SearchConfig, starts: list[Point], bounds: Mapping[str, float]) -> Strategy:
    count = len(starts[0])
    coarse = _unique([*starts, *itertools.product(config.coarse, repeat=count)])

    def around(best: Point) -> Iterator[Point]:
        for offsets in itertools.product(config.fine, repeat=count):
            moved = (weight + offset for weight, offset in zip(best, offsets, strict=True))
            yield tuple(round(min(max(weight, config.low), config.high), 10) for weight in moved)

    def points(ended: Mapping[int, Evaluation], begun: Mapping[int, Point]) -> list[Point]:
        if any(slot not in ended for slot in range(len(coarse))):
            return coarse
        best = min(range(len(coarse)), key=lambda slot: ended[slot].value)
        return _unique([*coarse, *around(coarse[best])])

    return Strategy("grid", {**bounds, "coarse": config.coarse, "fine": config.fine}, points)


def _unique(points: Iterable[Point]) -> list[Point]:
    return list(dict.fromkeys(points))


def _seeded(kind: type[BaseSampler], seed: int, **options: Any) -> BaseSampler:
    """A sampler whose seed is of the trial: it draws other numbers after a restart, and beside another process."""

    class SeededByNumber(kind):  # type: ignore[valid-type, misc]
        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            super().__init__(seed=(1_000_003 * seed + trial.number) % 2**32, **options)
            super().before_trial(study, trial)

    sampler: BaseSampler = SeededByNumber(seed=seed, **options)
    return sampler
