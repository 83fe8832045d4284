"""The loss on images that are not trained on: of the base, and of what is learned so far."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from stagepatch.core import UserError, generator_for
from stagepatch.diffusion import Objective, between_levels
from stagepatch.training.config import HELD_OUT, HELD_OUT_BASE
from stagepatch.training.draws import Conditions, Draws
from stagepatch.training.log import RunLog
from stagepatch.training.losses import sample_losses
from stagepatch.training.validation_config import ValidationConfig

_QUARTERS = 4
_SEED = 102  # first part of the seeds, which training does not use


class HeldOutLosses:
    """The run's own loss over four equal ranges of the noise level, from the same images and noise each time.

    In each range, the images' timesteps are spread evenly over it. Neither noise nor timesteps depend on the run's
    seed or on how many processes there are, so that runs can be compared. Every process measures all of it.

    Args:
        config: how often, and of how many images.
        dataset: of images that are not trained on; items as `training.draws.draw` takes them.
        model: the base, before anything is put on it.
        objective: of the run.
        levels: least and most noise level that is trained on, which the four ranges are of.
        batch_size: images at a time.

    Raises:
        UserError: no steps or images, or a range of levels that no timestep has.
    """

    def __init__(
        self,
        config: ValidationConfig,
        dataset: Any,
        model: nn.Module,
        objective: Objective,
        levels: Sequence[float] = (0.0, 1.0),
        batch_size: int = 8,
    ) -> None:
        for name in ("loss_every", "loss_images"):
            if getattr(config, name) < 1:
                raise UserError(f"validation.{name}={getattr(config, name)} must be at least 1.")
        self.every, self.dataset, self.objective = config.loss_every, dataset, objective
        self.count = min(config.loss_images, len(dataset))
        low, high = levels
        edges = [low + (high - low) * place / _QUARTERS for place in range(_QUARTERS + 1)]
        self._ranges = {
            f"{first:.3g}-{last:.3g}": between_levels(objective.levels, first, last)
            for first, last in itertools.pairwise(edges)
        }
        # Spread over the dataset, in which classes may follow one another.
        numbers = {place * len(dataset) // self.count: place for place in range(self.count)}
        groups = dataset.groups() if hasattr(dataset, "groups") else [range(len(dataset))]
        kept = [[(numbers[item], item) for item in group if item in numbers] for group in groups]
        self._batches = [
            items[first : first + batch_size] for items in kept for first in range(0, len(items), batch_size)
        ]
        self._base = self._measure(model.eval())

    def is_due(self, done: int, steps: int) -> bool:
        """See `Check`."""
        return done % self.every == 0 or done == steps

    def __call__(self, model: nn.Module, done: int, log: RunLog) -> None:
        """See `Check`."""
        record: dict[str, float] = {"iteration": done}
        for prefix, losses in ((HELD_OUT, self._measure(model)), (HELD_OUT_BASE, self._base)):
            record |= {prefix + name: value for name, value in losses.items()}
        log.write(record)

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> dict[str, float]:
        """The mean loss by range, and of all ranges."""
        device, conditions = next(model.parameters()).device, Conditions(model, self.dataset)
        losses: dict[str, list[Tensor]] = {name: [] for name in self._ranges}
        for batch in self._batches:
            numbers, items = zip(*batch, strict=True)
            draws = self._draw(numbers, items, conditions, device)
            places = (torch.tensor(numbers, device=device) + 0.5) / self.count
            for name, (first, stop) in self._ranges.items():
                draws.timesteps = first + (places * (stop - first)).long()
                losses[name].append(sample_losses(model, self.objective, draws).double().cpu())
        means = {name: float(torch.cat(values).mean()) for name, values in losses.items()}
        return {**means, "all": sum(means.values()) / len(means)}

    def _draw(
        self, numbers: Sequence[int], items: Sequence[int], conditions: Conditions, device: torch.device
    ) -> Draws:
        """Images as in training, but neither mirrored nor without their condition; timesteps are still to come."""
        batch = default_collate([self.dataset[item] for item in items])
        images = batch["image"].float()
        drawn = [
            torch.randn(2, *image.shape, generator=generator_for(torch.device("cpu"), _SEED, number))
            for number, image in zip(numbers, images, strict=True)
        ]
        noise, of_latents = torch.stack(drawn, dim=1)
        if "std" in batch:
            images = images + batch["std"].float() * of_latents
        nothing = torch.zeros(len(items), dtype=torch.long, device=device)
        return Draws(images.to(device), noise.to(device), nothing, conditions.of(batch, nothing.bool()))
