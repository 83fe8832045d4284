"""What is drawn at a timestep, and its loss: as in training, but for the timestep and for dropped conditions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from stagepatch.core import UserError, seed_for
from stagepatch.diffusion import Objective
from stagepatch.training import Conditions, Draws, TrainingConfig, draw, load_batches

_ANALYSIS = 101  # first part of the seeds, which training does not use


def even_timesteps(num_train_timesteps: int, count: int, name: str = "timesteps") -> list[int]:
    """The middles of `count` equal ranges of T timesteps: all of them where there are T.

    Args:
        name: of the option that says how many.

    Raises:
        UserError: fewer than 2, or more than T.
    """
    if not 2 <= count <= num_train_timesteps:
        raise UserError(f"{name}={count} must be from 2 to {num_train_timesteps}, the model's.")
    return [int((place + 0.5) * num_train_timesteps / count) for place in range(count)]


@dataclass(frozen=True)
class Samples:
    """Images, noise and conditions at timesteps, the same at every call.

    Args:
        dataset: see `training.draws.draw` for its items.
        timesteps: [n].
        count: samples at each timestep.
        batch_size: samples at a time.
        seed: of images and noise.
        horizontal_flip: mirror each image with probability ½.
        num_workers: loading processes.
        on_batch: called with the number of samples of a batch once it is done with.
        same_images: every timestep has the same ones in the same order, with noise of its own.
    """

    dataset: Dataset[dict[str, Any]]
    timesteps: Sequence[int]
    count: int
    batch_size: int = 64
    seed: int = 0
    horizontal_flip: bool = False
    num_workers: int = 0
    on_batch: Callable[[int], object] = lambda count: None
    same_images: bool = False

    def at(self, timestep: int, model: nn.Module, objective: Objective, half: int | None = None) -> Iterator[Draws]:
        """The samples at a timestep, in batches, on the model's device.

        Images are drawn without repeating one before all had their turn. Another timestep or the other `half`, 0 or
        1, which is half as many, draws its images and its noise independently; with `same_images` its noise.
        """
        dataset: Any = self.dataset
        if len(dataset) == 0:
            raise UserError("There are no images to analyse the model on.")
        count = self.count if half is None else self.count // 2
        size = min(self.batch_size, count)
        seed = seed_for(_ANALYSIS, self.seed, timestep, half or 0)
        config = TrainingConfig(batch_size=size, label_dropout=0.0, seed=seed)
        conditions, device = Conditions(model, dataset), next(model.parameters()).device
        order = seed_for(_ANALYSIS, self.seed) if self.same_images else seed
        loader = load_batches(dataset, size, 0, math.ceil(count / size), order, self.num_workers)
        for number, batch in enumerate(loader):
            draws = draw(batch, config, objective, conditions, number, self.horizontal_flip, device)
            draws.timesteps.fill_(timestep)
            draws = draws.rows(slice(count - number * size))
            yield draws
            self.on_batch(len(draws.x_start))
