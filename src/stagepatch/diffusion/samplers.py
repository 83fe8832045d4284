"""Samplers by name, and their timesteps one by one."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from stagepatch.core import UserError, as_user_error
from stagepatch.diffusion.noise_schedule import in_thousandths, is_edm

_NAMES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}


def make_sampler(name: str, trained_with: Any, timestep_spacing: str = "") -> Any:
    """A sampler with the betas and the prediction type of the scheduler that a model was trained with.

    'ddpm' has the timesteps of the papers' code (improved diffusion's respacing, arXiv 2102.09672): evenly from T − 1
    to 0, both of them among it. Its class's name, 'DDPMScheduler', keeps the spacing of the model's scheduler.

    Args:
        timestep_spacing: diffusers' name of one, in place of these.

    Raises:
        UserError: no such scheduler, one for another kind of model (flow against diffusion), or one without spacings.
    """
    class_name = _NAMES.get(name.lower(), name)
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "set_timesteps"):
        raise UserError(
            f"diffusers has no scheduler '{name}'. Give the name of one of its classes, or one of: "
            f"{', '.join(_NAMES)}."
        )
    is_flow = "FlowMatch" in class_name
    if is_edm(scheduler_class) != is_edm(trained_with) or is_flow != ("FlowMatch" in type(trained_with).__name__):
        raise UserError(f"'{name}' does not fit a model trained with {type(trained_with).__name__}.")
    config = dict(in_thousandths(trained_with).config)
    config.pop("invert_sigmas", None)  # Mochi's, from image to noise; its family tells the model so
    if class_name != "DDPMScheduler":
        # The variance is split off before the sampler; some samplers would split off three channels themselves.
        config.pop("variance_type", None)
    if timestep_spacing and "timestep_spacing" not in inspect.signature(scheduler_class.__init__).parameters:
        raise UserError(
            f"'{name}' knows no timestep_spacing: leave '{timestep_spacing}' out, or use 'ddim' or 'ddpm'."
        )
    spacing = timestep_spacing or ("linspace" if name.lower() == "ddpm" else "")
    return scheduler_class.from_config(config, **({"timestep_spacing": spacing} if spacing else {}))


def sampler_fits(name: str, trained_with: Any, timestep_spacing: str = "") -> bool:
    """Whether `make_sampler` makes it."""
    try:
        make_sampler(name, trained_with, timestep_spacing)
    except UserError:
        return False
    return True


def set_steps(sampler: Any, count: int, name: str) -> None:
    """Set a sampler, which the user named so, to a number of steps.

    Raises:
        UserError: it cannot sample in so many.
    """
    with as_user_error(f"'{name}' cannot sample in {count} steps", ValueError):
        sampler.set_timesteps(count)


def takes_timesteps(sampler: Any) -> bool:
    """Whether a sampler takes any timesteps, rather than their number alone."""
    return _is_flow(sampler) or "timesteps" in inspect.signature(sampler.set_timesteps).parameters


def pin_timesteps(sampler: Any, timesteps: Sequence[float]) -> None:
    """Let a sampler of diffusers take these timesteps whenever it is set to a number of steps, which must be theirs.

    Args:
        timesteps: in training timesteps, from noise to image. Those that the sampler takes by itself it always takes.

    Raises:
        UserError: when they are set, by a sampler that cannot take them.
    """
    original = sampler.set_timesteps

    @functools.wraps(original)  # pipelines look for its arguments
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        own = sampler.timesteps.tolist()
        if len(own) != len(timesteps) or not np.allclose(own, timesteps, rtol=0.0, atol=1e-2):
            _replace(sampler, original, list(timesteps))

    sampler.set_timesteps = set_timesteps


def _replace(sampler: Any, set_timesteps: Any, timesteps: list[float]) -> None:
    if _is_flow(sampler):
        # Set to timesteps, these samplers would shift their sigmas a second time, or fail.
        sigmas = torch.tensor([*timesteps, 0.0], dtype=torch.float64) / sampler.config.num_train_timesteps
        sampler.timesteps = torch.tensor(timesteps, dtype=torch.float64).to(sampler.timesteps)
        sampler.sigmas = sigmas.to(sampler.sigmas)
        return
    name = type(sampler).__name__
    if not takes_timesteps(sampler):
        raise UserError(
            f"{name} takes no timesteps, only their number: use 'dpmsolver++', 'euler' or 'ddpm', or give the experts "
            f"ranges in place of steps."
        )
    with as_user_error(f"{name} cannot take the timesteps {timesteps}", ValueError):
        set_timesteps(timesteps=timesteps, device=sampler.timesteps.device)


def _is_flow(sampler: Any) -> bool:
    return "FlowMatchEuler" in type(sampler).__name__ or bool(sampler.config.get("use_flow_sigmas"))
