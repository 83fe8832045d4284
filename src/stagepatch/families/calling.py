"""How a denoiser is called, and what its config says of its condition and its output."""

from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.families.registry import family_of, uncompiled


def num_classes(model: nn.Module) -> int:
    """Classes that the model takes labels of; 0 where it takes none."""
    config = _config(model)
    if "conditioning" in config:
        return int(config["num_classes"]) if config["conditioning"] == "class" else 0
    if _is_diffusers_dit(config):
        return int(config["num_embeds_ada_norm"])
    return int(config.get("num_class_embeds") or 0)


def null_label(model: nn.Module) -> int | None:
    """The label that stands for no label; None where the model has none, as diffusers' U-Nets."""
    config = _config(model)
    has_null = "conditioning" in config or _is_diffusers_dit(config)
    return num_classes(model) if has_null and num_classes(model) else None


def learns_sigma(model: nn.Module) -> bool:
    """Whether the second half of the output's channels is the variance's interpolation."""
    config = _config(model)
    if "learn_sigma" in config:
        return bool(config["learn_sigma"])
    return bool(config.get("out_channels") == 2 * config["in_channels"])


def sample_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the model's own sample size."""
    config = _config(model)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def predict(model: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor | dict[str, Tensor]) -> Tensor:
    """The model's output [B, C or 2C, H, W] for a sample [B, C, H, W] at timesteps [B] of 0 to 1000.

    Args:
        condition: class labels [B], which an unconditional model is not told, or tensors by keyword, a row a sample.
    """
    if isinstance(condition, torch.Tensor):
        condition = {"class_labels": condition} if num_classes(model) else {}
    family = family_of(type(uncompiled(model)))
    return family.call(model, sample, family.own_timesteps(timesteps), condition)


def _is_diffusers_dit(config: dict[str, Any]) -> bool:
    return config.get("norm_type") == "ada_norm_zero" and "num_embeds_ada_norm" in config


def _config(model: nn.Module) -> dict[str, Any]:
    return model.config  # type: ignore[return-value]
