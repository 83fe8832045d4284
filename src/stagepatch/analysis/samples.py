"""What is drawn at a timestep, and its loss: as in training, but for the timestep and for dropped conditions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stagepatch.core.errors import UserError
from stagepatch.core.randomness import BatchOrder, seed_for
from stagepatch.diffusion import Objective
from stagepatch.families import predict
from stagepatch.training import TrainingConfig
from stagepatch.training.draws import Conditions, Draws, draw

_ANALYSIS = 101  # first part of the seeds, which training does not use


def even_timesteps(num_train_timesteps: int, count: int) -> list[int]:
    """The middles of `count` equal ranges of T timesteps.

    Raises:
        UserError: fewer than 2, or more than T.
    """
    if not 2 <= count <= num_train_timesteps:
        raise UserError(f"timesteps={count} must be from 2 to {num_train_timesteps}, the model's.")
    return [int((place + 0.5) * num_train_timesteps / count) for place in range(count)]


@dataclass(frozen=True)
class Samples:
    """Images, noise and conditions for a timestep, the same at every call.

    Args:
        dataset: see `training.draws.draw` for its items.
        batch_size: samples at a time.
        seed: of images and noise.
        horizontal_flip: mirror each image with probability ½.
        num_workers: loading processes.
    """

    dataset: Dataset[dict[str, Any]]
    batch_size: int = 64
    seed: int = 0
    horizontal_flip: bool = False
    num_workers: int = 0

    def at(self, timestep: int, count: int, model: nn.Module, objective: Objective, part: int = 0) -> Iterator[Draws]:
        """`count` samples at a timestep, in batches, on the model's device.

        Images are drawn without repeating one before all had their turn. Another timestep or another `part` draws
        its images and its noise independently.
        """
        if len(self.dataset) == 0:  # type: ignore[arg-type]
            raise UserError("There are no images to analyse the model on.")
        size = min(self.batch_size, count)
        config = TrainingConfig(
            batch_size=size, label_dropout=0.0, seed=seed_for(_ANALYSIS, self.seed, timestep, part)
        )
        groups = getattr(self.dataset, "groups", None)
        order = BatchOrder(
            groups() if groups is not None else [range(len(self.dataset))],  # type: ignore[arg-type]
            size,
            0,
            math.ceil(count / size),
            config.seed,
        )
        conditions = Conditions(model, self.dataset)
        here = SimpleNamespace(device=next(model.parameters()).device, process_index=0)
        loader = DataLoader(self.dataset, batch_sampler=order, num_workers=self.num_workers)
        for number, batch in enumerate(loader):
            draws = draw(batch, config, objective, conditions, number, self.horizontal_flip, here)
            left = min(size, count - number * size)
            yield Draws(
                draws.x_start[:left],
                draws.noise[:left],
                torch.full_like(draws.timesteps[:left], timestep),
                {name: value[:left] for name, value in draws.condition.items()},
            )


def sample_losses(model: nn.Module, objective: Objective, draws: Draws) -> Tensor:
    """The loss of each sample, by the model's own objective: [B]."""
    x_t = objective.add_noise(draws.x_start, draws.noise, draws.timesteps).to(next(model.parameters()).dtype)
    output = predict(model, x_t, objective.model_timesteps(draws.timesteps), draws.condition)
    return objective.loss(output, draws.x_start, draws.noise, draws.timesteps)
