"""Which timesteps a run trains on: all of them, or one range of several (DeMe, arXiv 2410.06664, supplement)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Generator, Tensor

from stagepatch.core import UserError
from stagepatch.diffusion.config import TimestepsConfig

_DENSITIES = ("uniform", "logit_normal", "mode", "cosmap")


@dataclass(frozen=True)
class TimestepSampler:
    """Draws timesteps from a range, now and then from all.

    Args:
        num_train_timesteps: T.
        first, stop: the range, from first to stop − 1.
        p: probability of drawing from all T instead (DeMe: 0.4 for CIFAR-10, 0.3 for others).
        antithetic: draw half of a batch and mirror it, each within what it was drawn from, so that the other half
            stands opposite (DeMe's released code).
    """

    num_train_timesteps: int
    first: int
    stop: int
    p: float = 0.0
    antithetic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop <= self.num_train_timesteps:
            raise UserError(
                f"The range of timesteps from {self.first} to {self.stop} is empty or not within 0 to "
                f"{self.num_train_timesteps}."
            )
        if not 0.0 <= self.p <= 1.0:
            raise UserError(f"p={self.p} must be a probability.")

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Timesteps [B] on the generator's device."""
        count = batch // 2 + 1 if self.antithetic else batch
        device = generator.device
        within = torch.randint(self.first, self.stop, (count,), generator=generator, device=device)
        anywhere = torch.randint(0, self.num_train_timesteps, (count,), generator=generator, device=device)
        is_anywhere = torch.rand(count, generator=generator, device=device) < self.p
        timesteps = torch.where(is_anywhere, anywhere, within)
        if not self.antithetic:
            return timesteps
        ends = torch.where(is_anywhere, self.num_train_timesteps - 1, self.first + self.stop - 1)
        return torch.cat([timesteps, ends - timesteps])[:batch]


@dataclass(eq=False)
class DensitySampler:
    """Draws timesteps as a config says.

    Args:
        levels: noise level of every timestep, [T], rising: `Objective.levels`.
        config: range and density.

    Raises:
        UserError: no such density, or a range that is empty.
    """

    levels: Tensor
    config: TimestepsConfig

    def __post_init__(self) -> None:
        config = self.config
        if len(config.range) != 2 or not 0.0 <= config.range[0] < config.range[1] <= 1.0:
            raise UserError(f"timesteps.range={config.range} must be two noise levels from 0 to 1, rising.")
        if config.density not in _DENSITIES:
            raise UserError(f"timesteps.density='{config.density}' is none of {', '.join(_DENSITIES)}.")
        if config.logit_std <= 0.0:
            raise UserError(f"timesteps.logit_std={config.logit_std} must be above 0.")
        if config.shift <= 0.0:
            raise UserError(f"timesteps.shift={config.shift} must be above 0.")
        self._first, self._stop = between_levels(self.levels, config.range[0], config.range[1])

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Timesteps [B] on the generator's device. A density is that of the whole, scaled into the range."""
        config = self.config
        shape = (config.logit_mean, config.logit_std, config.mode_scale)
        level: Tensor = compute_density_for_timestep_sampling(
            config.density, batch, *shape, generator.device, generator
        )
        if config.density == "cosmap":  # which diffusers has as a weight of the loss, not as a density
            level = 1.0 - 1.0 / (torch.tan(level * math.pi / 2.0) + 1.0)
        if config.shift != 1.0:
            level = config.shift * level / (1.0 + (config.shift - 1.0) * level)
        timesteps = (self._first + (self._stop - self._first) * level).long()
        return timesteps.clamp(self._first, self._stop - 1)


@dataclass(frozen=True)
class IntervalSampler:
    """Draws as many timesteps from each of k intervals (ANT, arXiv 2306.00354, released code).

    Args:
        intervals: [first, stop) of each. Row i of a batch is of interval i mod k, so that any part of a batch that
            begins at a multiple of k, and divides by it, holds each alike.
    """

    intervals: tuple[tuple[int, int], ...]

    def draw(self, batch: int, generator: Generator) -> Tensor:
        """Timesteps [B] on the generator's device."""
        ends = torch.tensor(self.intervals, device=generator.device)
        first, stop = ends[torch.arange(batch, device=generator.device) % len(ends)].unbind(dim=1)
        place = torch.rand(batch, generator=generator, device=generator.device)
        return torch.minimum(first + (place * (stop - first)).long(), stop - 1)


def make_timesteps(config: TimestepsConfig, levels: Tensor) -> DensitySampler | None:
    """What draws timesteps as a config says; None where that is all of them alike.

    Args:
        levels: see `DensitySampler`.

    Raises:
        UserError: see `DensitySampler`.
    """
    return None if config == TimestepsConfig() else DensitySampler(levels, config)


def between_levels(levels: Tensor, low: float, high: float) -> tuple[int, int]:
    """The first timestep with low ≤ noise level < high, and the one behind the last; a level of 1 is within high = 1.
    Levels are compared to a millionth.

    In the shifted schedule of a flow, a noise level of a quarter is not a quarter of T: a range means what the model
    is told, in training as in sampling.

    Args:
        levels: of every timestep, [T], rising.

    Raises:
        UserError: none is in between.
    """
    first = int((levels < low - 1e-6).sum())
    stop = len(levels) if high >= 1.0 else int((levels < high - 1e-6).sum())
    if first >= stop:
        raise UserError(f"None of the {len(levels)} timesteps has a noise level from {low:g} to {high:g}.")
    return first, stop


def equal_in_t(num_train_timesteps: int, count: int) -> list[tuple[int, int]]:
    """T split into `count` ranges of equal length, from the image's end to the noise's (DeMe)."""
    _check_count(num_train_timesteps, count)
    return split_at(num_train_timesteps, [round(place * num_train_timesteps / count) for place in range(1, count)])


def equal_in_log_snr(snr: Tensor, count: int) -> list[tuple[int, int]]:
    """T split where log-SNR falls by equal amounts.

    Args:
        snr: of every timestep, [T], falling.
    """
    _check_count(len(snr), count)
    logarithm = log_snr(snr)
    levels = torch.linspace(float(logarithm[0]), float(logarithm[-1]), count + 1, dtype=torch.float64)[1:-1]
    return split_at(len(snr), [int((logarithm > level).sum()) for level in levels])


def log_snr(snr: Tensor) -> Tensor:
    """log SNR [T] in float64; at pure noise, whose SNR is 0, that of the least that is above it."""
    return snr.double().clamp_min(float(snr[snr > 0.0].min())).log()


def split_at(num_train_timesteps: int, boundaries: Sequence[int]) -> list[tuple[int, int]]:
    """T split before the given timesteps.

    Raises:
        UserError: they do not rise, or leave a range empty.
    """
    edges = [0, *boundaries, num_train_timesteps]
    if any(later <= earlier for earlier, later in itertools.pairwise(edges)):
        raise UserError(f"boundaries={list(boundaries)} must rise between 0 and {num_train_timesteps}.")
    return list(itertools.pairwise(edges))


def _check_count(num_train_timesteps: int, count: int) -> None:
    if not 1 <= count <= num_train_timesteps:
        raise UserError(f"{num_train_timesteps} timesteps cannot be split into {count} ranges.")
