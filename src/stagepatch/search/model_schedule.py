"""Which model denoises which step: evolution under a time budget, led by a predictor (OMS-DPM, arXiv 2306.08860)."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stagepatch.core import UserError
from stagepatch.search.engine import Evaluation, Point, Strategy

# The number of a model for each step, from noise to image; NONE leaves the step out.
Choices = tuple[int, ...]
NONE = -1

_PARENTS = 10  # the best so far, of which two have a child
_CHILDREN = 8  # of which the predictor chooses the one to evaluate
_TRIES = 1000


@dataclass(frozen=True)
class Space:
    """The schedules within a budget.

    Args:
        costs: seconds of a step with each model.
        steps: to choose among.
        budget: seconds for all steps.
        drop_steps: whether steps may be left out.

    Raises:
        UserError: not even the cheapest schedule is within the budget.
    """

    costs: tuple[float, ...]
    steps: int
    budget: float
    drop_steps: bool = True

    def __post_init__(self) -> None:
        least = min(self.costs) * (1 if self.drop_steps else self.steps)
        if not self.holds(least):
            raise UserError(
                f"No schedule is within the budget of {self.budget:.3g} s: the cheapest takes {least:.3g} s. Give a "
                f"larger budget" + ("." if self.drop_steps else ", or let steps be left out with drop_steps=true.")
            )

    def seconds(self, choices: Choices) -> float:
        """What a schedule takes."""
        return math.fsum(self.costs[choice] for choice in choices if choice != NONE)

    def holds(self, seconds: float) -> bool:
        """Whether a time is within the budget, but for rounding."""
        return seconds <= self.budget * (1.0 + 1e-9)

    @property
    def cheapest(self) -> int:
        """The number of the model of the least cost."""
        return self.costs.index(min(self.costs))

    @property
    def fallback(self) -> int:
        """What a step gets that the budget has no room for."""
        return NONE if self.drop_steps else self.cheapest

    def options(self) -> list[int]:
        """What a step may be given to."""
        return [*range(len(self.costs)), *([NONE] if self.drop_steps else [])]

    def repaired(self, choices: Choices, draw: random.Random) -> Choices:
        """A schedule brought within the budget: steps at random are left out, or else given to the cheapest model, one
        by one. One step at least remains."""
        mended = list(choices)
        while not self.holds(self.seconds(tuple(mended))):
            step = draw.choice([step for step, choice in enumerate(mended) if choice != self.fallback])
            mended[step] = self.fallback
        if all(choice == NONE for choice in mended):
            mended[draw.randrange(self.steps)] = self.cheapest
        return tuple(mended)

    def evenly(self, model: int) -> Choices:
        """One model at as many evenly spaced steps as the budget has room for; where steps cannot be left out and it
        is too dear for all, the cheapest model at the others."""
        rest = 0.0 if self.drop_steps else self.costs[self.cheapest]
        extra = self.costs[model] - rest
        room = self.budget * (1.0 + 1e-9) - rest * self.steps
        count = self.steps if extra * self.steps <= room else int(room / extra)
        chosen = {round(step) for step in np.linspace(0, self.steps - 1, count)} if count else set()
        return tuple(model if step in chosen else self.fallback for step in range(self.steps))

    def starts(self) -> list[Choices]:
        """Each model alone, the first first."""
        alone = [self.evenly(model) for model in range(len(self.costs))]
        return [choices for choices in dict.fromkeys(alone) if any(choice != NONE for choice in choices)]


def evolution(space: Space, evaluations: int, seed: int) -> Strategy:
    """The strategy of so many evaluations that `propose` names."""
    return one_by_one("evolution", evaluations, lambda known: propose(space, known, seed))


def one_by_one(name: str, evaluations: int, propose: Callable[[Mapping[Choices, float]], Choices | None]) -> Strategy:
    """The strategy of so many evaluations, all of them within the budget and no two alike.

    What it proposes depends on the seed and on what is known alone, so that a search that was stopped goes on as it
    would have. What other processes are at counts as known, and as bad.

    Args:
        propose: the values of what is known [lower is better; infinite where there is none] → the next schedule, None
            where there are no others.
    """

    def points(ended: Mapping[int, Evaluation], begun: Mapping[int, Point]) -> list[Point]:
        known = {
            tuple(map(int, begun[slot])): ended[slot].value if slot in ended else math.inf
            for slot in sorted(begun)[:evaluations]
        }
        proposed = propose(known) if len(known) < evaluations else None
        return [*known, proposed] if proposed else list(known)

    return Strategy(name, {}, points, evaluations=evaluations)


def propose(space: Space, known: Mapping[Choices, float], seed: int) -> Choices | None:
    """The next model schedule to evaluate; None where there seem to be no others.

    First each model alone, then some at random, then children of the best: of several, the one that the predictor
    takes for the best.

    Args:
        known: value of each [lower is better]; infinite where there is none.
    """
    for start in space.starts():
        if start not in known:
            return start
    draw = random.Random(f"{seed} {len(known)}")
    if len(known) < len(space.starts()) + _PARENTS:
        return random_schedule(space, known, draw)
    parents = sorted(known, key=known.__getitem__)[:_PARENTS]
    children = [_unknown(space, _child(space, parents, draw), known, draw) for _ in range(_CHILDREN)]
    found = [child for child in children if child is not None]
    return found[int(np.argmin(_predicted(found, known, len(space.costs))))] if found else None


def random_schedule(space: Space, known: Mapping[Choices, float], draw: random.Random) -> Choices | None:
    """A schedule within the budget that is not known yet; None where there seem to be no others."""
    return _unknown(space, tuple(draw.choices(space.options(), k=space.steps)), known, draw)


def _child(space: Space, parents: list[Choices], draw: random.Random) -> Choices:
    """Each step of one parent or the other; on average one is drawn anew."""
    pair = draw.sample(parents, 2) if len(parents) > 1 else parents * 2
    mixed = [draw.choice(both) for both in zip(*pair, strict=True)]
    return tuple(draw.choice(space.options()) if draw.random() < 1.0 / space.steps else choice for choice in mixed)


def _unknown(space: Space, choices: Choices, known: Mapping[Choices, float], draw: random.Random) -> Choices | None:
    """A schedule within the budget and not known yet, by drawing further steps anew if need be."""
    for _ in range(_TRIES):
        choices = space.repaired(choices, draw)
        if choices not in known:
            return choices
        changed = list(choices)
        changed[draw.randrange(space.steps)] = draw.choice(space.options())
        choices = tuple(changed)
    return None


def _predicted(candidates: list[Choices], known: Mapping[Choices, float], models: int) -> np.ndarray:
    """Their values by ridge regression on those that are known."""
    from sklearn.linear_model import Ridge

    finite = {choices: value for choices, value in known.items() if math.isfinite(value)}
    if len(finite) < 2:
        return np.zeros(len(candidates))
    scale = float(np.std(list(finite.values()))) or 1.0
    model = Ridge(alpha=1.0).fit(
        [_features(choices, models) for choices in finite], [value / scale for value in finite.values()]
    )
    predicted: np.ndarray = model.predict([_features(choices, models) for choices in candidates])
    return predicted


def _features(choices: Choices, models: int) -> list[float]:
    """Which model each step has, and how far the steps that are kept lie apart at each place."""
    one_hot = [float(choice == model) for choice in choices for model in range(models)]
    kept = [-1, *(step for step, choice in enumerate(choices) if choice != NONE), len(choices)]
    gaps = [float(after - before) for before, after in pairwise(kept) for _ in range(before, after)]
    return one_hot + gaps
