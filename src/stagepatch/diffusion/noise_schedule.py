"""Noise schedules: diffusers' schedulers, made from a config or read from a model's directory."""

import math
from dataclasses import asdict
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.diffusion.config import ObjectiveConfig


def make_scheduler(config: ObjectiveConfig, learn_sigma: bool = False) -> Any:
    """The scheduler that an objective's config describes.

    Args:
        config: schedule and prediction type.
        learn_sigma: the model predicts the variance's interpolation too, and samplers should use it.
    """
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    # The config's fields are the scheduler's own.
    return DDPMScheduler(**asdict(config), variance_type="learned_range" if learn_sigma else "fixed_small")


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is of rectified flow, rather than of diffusion."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def is_edm(scheduler: Any) -> bool:
    """Whether a scheduler is of EDM (arXiv 2206.00364): what the model is given and gives is scaled, and it is told
    ¼ ln σ in place of a timestep."""
    return hasattr(scheduler, "precondition_outputs")


def edm_sigmas(scheduler: Any) -> Tensor:
    """EDM's training noise levels, even in ln σ, from low to high: [T], float64."""
    config = scheduler.config
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    return torch.linspace(low, high, config.num_train_timesteps, dtype=torch.float64).exp()


def check_tells_timesteps(scheduler: Any, what: str) -> None:
    """See that a model is told timesteps, of which ranges are.

    Raises:
        UserError: it is told something else.
    """
    if is_edm(scheduler):
        raise UserError(
            f"{what} is by the timestep, 0 to 1000, that the model is told; one of {type(scheduler).__name__} is told "
            f"¼ ln σ. Leave it out."
        )


def in_thousandths(scheduler: Any) -> Any:
    """A flow's scheduler as it is, or with a thousand training timesteps where it has one, whose time runs from 0 to 1
    (OmniGen): the model's family says what the model is told."""
    if scheduler.config.get("num_train_timesteps") != 1:
        return scheduler
    return type(scheduler).from_config(scheduler.config, num_train_timesteps=1000)


def flow_sigmas(scheduler: Any) -> Tensor:
    """Sigmas of a flow's training timesteps, from low to high: [T]."""
    config = scheduler.config
    if "FlowMatch" not in type(scheduler).__name__:
        # A solver that can also do flows has no training sigmas of its own.
        scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("flow_shift", 1.0))
    # A scheduler that has sampled holds the sigmas of its steps, and any holds them from high to low.
    sigmas: Tensor = type(scheduler).from_config(scheduler.config).sigmas[: config.num_train_timesteps]
    return sigmas.flip(0)


def at_timesteps(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """Values [T] at timesteps [B], shaped to be multiplied with `like` [B, …], in its type or at least float32."""
    # Cast before it moves: some accelerators have no float64.
    picked = values.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)[timesteps]
    return picked.view(-1, *[1] * (like.ndim - 1))
