"""Training the model's own weights: all of them, or biases and norms alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stagepatch.checkpoints import save_denoiser
from stagepatch.methods.weights import load_weights, save_weights

_NORMS = ("LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm2d")


class Finetune:
    """Trains every weight, and saves them.

    The model stays in eval mode: the loop drops labels itself, once per sample, so that no module does it again.
    """

    name = "finetune"

    def __init__(self) -> None:
        self.model: nn.Module
        self.trained: list[str] = []

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        self.model = model.requires_grad_(False).eval()
        chosen = self._choose(model)
        self.trained = list(chosen)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return [{"params": list(chosen.values()), "factor": 1.0}]

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        return None, {}

    def save(self, directory: Path) -> None:
        save_weights(self.model, self.trained, directory)

    def load(self, model: nn.Module, directory: Path) -> None:
        load_weights(model, directory)
        self.model = model


class BitFit(Finetune):
    """Trains biases, and the scales of norms, alone (arXiv 2106.10199)."""

    name = "bitfit"

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        in_norms = {
            f"{path}.weight" for path, module in model.named_modules() if type(module).__name__.endswith(_NORMS)
        }
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.endswith("bias") or name in in_norms
        }


class Pretrain(Finetune):
    """Trains every weight, and saves a whole model directory.

    Args:
        scheduler: saved beside the model.
    """

    name = "pretrain"

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler

    def save(self, directory: Path) -> None:
        save_denoiser(self.model, self.scheduler, directory)
