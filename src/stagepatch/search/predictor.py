"""A learned predictor of how good a model schedule is (OMS-DPM, arXiv 2306.08860), and evolution by what it says.

As in the authors' code for DDIM: the model of each step as an embedding, its timestep as another, an LSTM over the
steps, an MLP; it learns to rank evaluated schedules. Sizes, optimizer and the evolution's numbers are that code's too,
where nothing else is said.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.search.engine import Strategy
from stagepatch.search.model_schedule import NONE, Choices, Space, one_by_one, random_schedule

_SINUSOIDS = 128
_POPULATION = 40  # the best by the predictor; as many children a generation
_GENERATIONS = 100  # the authors' code: 500 or 1,000, of schedules of 60 to 200 steps
_CHANGES = 10  # of a child's steps, at most
_EPOCHS = 100  # the authors' code: 1,000, in batches of 512, of thousands of schedules
_ROUND = 10  # evaluations after which the predictor learns anew


class SchedulePredictor(nn.Module):
    """Scores of model schedules, lower is better: only their order means something.

    Args:
        timesteps: of the steps, from noise to image.
        models: how many there are; leaving a step out counts as one more.
    """

    def __init__(self, timesteps: Sequence[float], models: int) -> None:
        super().__init__()
        self.model = nn.Embedding(models + 1, 32)
        self.timestep = TimestepEmbedding(_SINUSOIDS, 64)
        self.lstm = nn.LSTM(32 + 64, 128, batch_first=True)
        hidden = [nn.Linear(128, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
        self.head = nn.Sequential(*hidden, nn.Linear(200, 1))
        sinusoids = get_timestep_embedding(torch.tensor(timesteps, dtype=torch.float32), _SINUSOIDS)
        self.register_buffer("sinusoids", sinusoids)

    def forward(self, schedules: Tensor) -> Tensor:
        """Scores [B] of schedules [B, steps], the number of each step's model or NONE."""
        steps = self.timestep(self.sinusoids).expand(len(schedules), -1, -1)
        states, _ = self.lstm(torch.cat([self.model(schedules - NONE), steps], dim=2))
        whole = F.normalize(F.normalize(states, dim=2).mean(dim=1), dim=1)
        scores: Tensor = self.head(whole).squeeze(1)
        return scores


def ranking_loss(scores: Tensor, values: Tensor, margin: float = 1.0, threshold: float = 0.0) -> Tensor:
    """Mean over all pairs of max(0, margin − sign(vᵢ − vⱼ)(sᵢ − sⱼ)); zero where there is no pair.

    Args:
        scores, values: predicted and measured, [B].
        threshold: pairs whose values differ by no more are left out (the authors' code: 0.25 of FID).
    """
    first, second = torch.triu_indices(len(values), len(values), 1)
    differ = (values[first] - values[second]).abs() > threshold
    first, second = first[differ], second[differ]
    if not len(first):
        return scores.sum() * 0.0
    target = (values[first] - values[second]).sign()
    return F.margin_ranking_loss(scores[first], scores[second], target, margin)


def fit_predictor(
    known: Mapping[Choices, float], timesteps: Sequence[float], models: int, seed: int, epochs: int = _EPOCHS
) -> SchedulePredictor:
    """A predictor that has learned the order of some schedules; those of no finite value it does not see.

    Every epoch is one step of Adam on all pairs (the authors' code: on two pairs a schedule, drawn). The caller's
    random numbers stay as they are.
    """
    finite = {choices: value for choices, value in known.items() if math.isfinite(value)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = SchedulePredictor(timesteps, models)
    if len(finite) < 2:
        return predictor.eval()
    schedules, values = torch.tensor(list(finite)), torch.tensor(list(finite.values()), dtype=torch.float64)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
    with torch.enable_grad():
        for _ in range(epochs):
            optimizer.zero_grad()
            ranking_loss(predictor(schedules), values).backward()
            optimizer.step()
    return predictor.eval()


@torch.no_grad()
def predicted_best(
    space: Space,
    score: Callable[[Tensor], Tensor],
    known: Mapping[Choices, float],
    draw: random.Random,
    generations: int = _GENERATIONS,
) -> list[Choices]:
    """The schedules within the budget that evolution finds besides those that are known, the lowest score first.

    A child is the better of two drawn parents with up to ten steps drawn anew. What is over the budget is repaired
    (the authors' code: dropped), and the evolution starts from what is known (theirs: from one schedule at random).
    """
    found: dict[Choices, float] = {}

    def add(schedules: Sequence[Choices]) -> None:
        new = [choices for choices in dict.fromkeys(schedules) if choices not in found]
        if new:
            found.update(zip(new, score(torch.tensor(new)).tolist(), strict=True))

    def child(population: Sequence[Choices]) -> Choices:
        parent = min((draw.choice(population) for _ in range(2)), key=found.__getitem__)
        changed = list(parent)
        for step in draw.sample(range(space.steps), draw.randint(1, min(_CHANGES, space.steps))):
            changed[step] = draw.choice(space.options())
        return space.repaired(tuple(changed), draw)

    population = sorted(known, key=known.__getitem__)[:_POPULATION]
    add(population)
    for _ in range(generations):
        children = [child(population) for _ in range(_POPULATION)]
        add(children)
        population = sorted({*population, *children}, key=lambda choices: (found[choices], choices))[:_POPULATION]
    return sorted(set(found) - set(known), key=lambda choices: (found[choices], choices))


def predicted_evolution(space: Space, timesteps: Sequence[float], evaluations: int, drawn: int, seed: int) -> Strategy:
    """The strategy of OMS-DPM: schedules drawn at random are evaluated first, then those that the predictor takes for
    the best.

    After every ten further evaluations the predictor learns anew (the authors' code: once, of the random schedules).

    Args:
        drawn: how many are drawn at random, after each model alone.
    """

    @lru_cache(1)
    def ranked(learned: tuple[tuple[Choices, float], ...]) -> list[Choices]:
        known, draw = dict(learned), random.Random(f"{seed} {len(learned)}")
        return predicted_best(space, fit_predictor(known, timesteps, len(space.costs), seed), known, draw)

    def propose(known: Mapping[Choices, float]) -> Choices | None:
        for start in space.starts():
            if start not in known:
                return start
        more = len(known) - len(space.starts()) - drawn
        if more >= 0:
            for choices in ranked(tuple(known.items())[: len(known) - more % _ROUND]):
                if choices not in known:
                    return choices
        return random_schedule(space, known, random.Random(f"{seed} {len(known)}"))

    return one_by_one("predictor", evaluations, propose)
