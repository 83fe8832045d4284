"""A sampler's timesteps one by one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from stagepatch.core.errors import UserError


def takes_timesteps(sampler: Any) -> bool:
    """Whether a sampler can be given any timesteps, rather than their number alone."""
    return _is_flow(sampler) or "timesteps" in inspect.signature(sampler.set_timesteps).parameters


def pin_timesteps(sampler: Any, timesteps: Sequence[float]) -> None:
    """Let a sampler of diffusers take these timesteps whenever it is told a number of steps, which must be theirs.

    Args:
        timesteps: in training timesteps, from noise to image. Those that the sampler takes by itself it may always be
            given.

    Raises:
        UserError: when they are set, by a sampler that cannot take them.
    """
    original = sampler.set_timesteps

    @functools.wraps(original)  # pipelines look for its arguments
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if not _are(sampler.timesteps.tolist(), timesteps):
            _replace(sampler, original, timesteps)

    sampler.set_timesteps = set_timesteps


def _are(those: Sequence[float], these: Sequence[float]) -> bool:
    return len(those) == len(these) and all(abs(a - b) < 1e-2 for a, b in zip(those, these, strict=True))


def _replace(sampler: Any, set_timesteps: Any, timesteps: Sequence[float]) -> None:
    if _is_flow(sampler):
        # Told timesteps, these samplers would shift their sigmas a second time, or fail.
        sigmas = torch.tensor([*timesteps, 0.0], dtype=torch.float64) / sampler.config.num_train_timesteps
        sampler.timesteps = torch.tensor(timesteps, dtype=torch.float64).to(sampler.timesteps)
        sampler.sigmas = sigmas.to(sampler.sigmas)
        return
    name = type(sampler).__name__
    if not takes_timesteps(sampler):
        raise UserError(
            f"{name} can be told no timesteps, only their number: use 'dpmsolver++', 'euler' or 'ddpm', or give the "
            f"experts ranges in place of steps."
        )
    try:
        set_timesteps(timesteps=list(timesteps), device=sampler.timesteps.device)
    except ValueError as error:
        raise UserError(f"{name} cannot take the timesteps {list(timesteps)}: {error}") from error


def _is_flow(sampler: Any) -> bool:
    return "FlowMatchEuler" in type(sampler).__name__ or bool(sampler.config.get("use_flow_sigmas"))
