"""The four verbs that the training loop knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Method(Protocol):
    """A way to train on from a model."""

    name: str

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        """Set up the model for training.

        Returns:
            The optimizer's parameter groups: `params`, and `factor` on the learning rate.
        """
        ...

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the last forward adds to the denoising loss, and scalars worth logging."""
        ...

    def save(self, directory: Path) -> None:
        """Write what was learned, and only that."""
        ...

    def load(self, model: nn.Module, directory: Path) -> None:
        """Put what `save` wrote on a fresh model."""
        ...
