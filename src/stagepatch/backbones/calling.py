"""How a denoiser is called: its condition's keyword, its null label, whether it predicts a variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def condition_arguments(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that carry class labels [B] to the model; none for an unconditional one."""
    return {"class_labels": labels} if is_class_conditional(model) else {}


def is_class_conditional(model: nn.Module) -> bool:
    """Whether the model takes class labels."""
    return _config(model).get("conditioning") == "class"


def null_label(model: nn.Module) -> int:
    """The label that stands for no label."""
    return int(_config(model)["num_classes"])


def learns_sigma(model: nn.Module) -> bool:
    """Whether the second half of the output's channels is the variance's interpolation."""
    return bool(_config(model).get("learn_sigma", False))


def sample_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the model's own sample size."""
    config = _config(model)
    return config["in_channels"], config["sample_size"], config["sample_size"]


def predict(model: nn.Module, sample: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """The model's output [B, C or 2C, H, W] for a sample [B, C, H, W] at timesteps [B]."""
    arguments = condition_arguments(model, labels)
    output: tuple[torch.Tensor, ...] = model(sample, timesteps, return_dict=False, **arguments)
    return output[0]


def _config(model: nn.Module) -> dict[str, Any]:
    return model.config  # type: ignore[return-value]
