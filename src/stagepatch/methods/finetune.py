"""Training all weights: pretraining from scratch, and full fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stagepatch.backbones import load_denoiser, save_denoiser


class Finetune:
    """Trains every weight of the model and saves a whole model directory.

    The model stays in eval mode: the loop drops labels itself, once per sample, so that no module does it again.

    Args:
        scheduler: saved beside the model.
    """

    name = "finetune"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.model: nn.Module

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        self.model = model.requires_grad_(True).eval()
        return [{"params": list(model.parameters()), "factor": 1.0}]

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        return None, {}

    def save(self, directory: Path) -> None:
        save_denoiser(self.model, self.scheduler, directory)

    def load(self, model: nn.Module, directory: Path) -> None:
        trained, self.scheduler = load_denoiser(directory)
        model.load_state_dict(trained.state_dict())
        self.model = model
