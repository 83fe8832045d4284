"""The base model itself, as a row to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Untrained:
    """Trains nothing and saves nothing."""

    name = "none"

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        return []

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        return None, {}

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, model: nn.Module, directory: Path) -> None:
        return None
