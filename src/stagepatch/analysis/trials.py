"""Short trainings from a model: does more of the same lower its loss, or weights of its own for each range?"""

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.analysis.losses import loss_at_timesteps
from stagepatch.analysis.samples import Samples
from stagepatch.diffusion import Objective, TimestepSampler, TimestepsConfig, equal_in_t, make_timesteps
from stagepatch.methods import Finetune
from stagepatch.training import TrainingConfig, train

RANGES = 4  # as DeMe's stages and the quarters of a table of losses
# More often where noise is high: the density that gained on the bench of docs/evidence.md.
DENSITY = TimestepsConfig(density="logit_normal", logit_mean=1.0)


@dataclass
class Trial:
    """What a training did to the losses.

    Args:
        held_out, trained: losses [n, m] afterwards, on images that it did not see and on some that it may have.
    """

    learning_rate: float
    held_out: Tensor
    trained: Tensor


@dataclass
class Trials:
    """Trains copies of a model, all weights, from a warm restart: the rate falls to zero, the weights are averaged.

    Args:
        model: stays as it is.
        dataset: training images.
        held_out, trained: what losses are measured on afterwards.
        steps, batch_size: of each training.
        on_training: called with each one's name before it begins.
    """

    model: nn.Module
    objective: Objective
    dataset: Any
    held_out: Samples
    trained: Samples
    steps: int
    batch_size: int
    seed: int = 0
    on_training: Callable[[str], object] = lambda name: None

    def longer(self, rate: float) -> Trial:
        """Trained on, all timesteps alike."""
        self.on_training(f"trained on at {rate:g}")
        return self._measure(self._train(rate, self.steps, None), rate)

    def other_density(self, rate: float) -> Trial:
        """Trained on with timesteps drawn by DENSITY."""
        self.on_training(f"trained on at {rate:g}, t logit-normal")
        return self._measure(self._train(rate, self.steps, make_timesteps(DENSITY, self.objective.levels)), rate)

    def by_range(self, rate: float) -> Trial:
        """A copy for each quarter of the timesteps, trained on it alone: each has as many samples of its own quarter
        as `longer` has, and all of its weights for them."""
        total, parts = self.objective.num_train_timesteps, list[Trial]()
        for first, stop in equal_in_t(total, RANGES):
            self.on_training(f"a copy for t = {first} to {stop - 1} at {rate:g}")
            own = [timestep for timestep in self.held_out.timesteps if first <= timestep < stop]
            if own:
                steps = math.ceil(self.steps / RANGES)
                parts.append(self._measure(self._train(rate, steps, TimestepSampler(total, first, stop)), rate, own))
        losses = [torch.cat([getattr(part, name) for part in parts]) for name in ("held_out", "trained")]
        return Trial(rate, *losses)

    def _train(self, rate: float, steps: int, timesteps: Any) -> nn.Module:
        model, objective = copy.deepcopy(self.model), replace(self.objective, timesteps=timesteps)
        config = TrainingConfig(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=rate,
            lr_scheduler="linear",
            warmup_steps=steps // 20,
            ema_decay=average_over(steps),
            log_every=steps,
            checkpoint_every=steps,
            tensorboard=False,
            seed=self.seed,
        )
        flip, workers = self.trained.horizontal_flip, self.trained.num_workers
        with tempfile.TemporaryDirectory() as directory:
            options: dict[str, Any] = {"horizontal_flip": flip, "num_workers": workers, "progress": False}
            train(model, Finetune(), objective, self.dataset, config, Path(directory), **options)
        return model.requires_grad_(False).eval()

    def _measure(self, model: nn.Module, rate: float, timesteps: list[int] | None = None) -> Trial:
        both = [
            loss_at_timesteps(
                model, self.objective, samples if timesteps is None else replace(samples, timesteps=timesteps)
            )
            for samples in (self.held_out, self.trained)
        ]
        return Trial(rate, *both)


def average_over(steps: int) -> float:
    """Decay of an average over about the last tenth of a training."""
    return min(0.9999, max(0.5, 1.0 - 10.0 / steps))


def density_at(objective: Objective, timesteps: list[int]) -> Tensor:
    """DENSITY at each of some timesteps, up to a factor: [n], float64."""
    level = (torch.tensor(timesteps, dtype=torch.float64) + 0.5) / objective.num_train_timesteps
    distance = (level.logit() - DENSITY.logit_mean) / DENSITY.logit_std
    return (-0.5 * distance.square()).exp() / (level * (1.0 - level))
