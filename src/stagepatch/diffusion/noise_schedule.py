"""Noise schedules: diffusers' schedulers, made from a config or read from a model's directory."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from stagepatch.diffusion.config import ObjectiveConfig


def make_scheduler(config: ObjectiveConfig, learn_sigma: bool = False) -> Any:
    """The scheduler that an objective's config describes.

    Args:
        config: schedule and prediction type.
        learn_sigma: the model predicts the variance's interpolation too, and samplers should use it.
    """
    if config.prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps)
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample,
        variance_type="learned_range" if learn_sigma else "fixed_small",
    )
