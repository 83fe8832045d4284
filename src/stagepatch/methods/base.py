"""The verbs that the training loop knows of a method."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from stagepatch.methods.config import MethodConfig


class Method(ABC):
    """A way to train on from a model.

    Attributes:
        name: as in METHODS.
        kind: of what it saves, as `open_artifact` calls it.
        marker: a file that only a directory of that kind has.
        starts_at_base: whether the model, once prepared, still says what it did.
        goes_by_timestep: whether what it learns reads a noise level off the timestep that the model is told.
        progress: share of training that is done, which the loop says before each step.
        x_start: the clean images or latents of the last forward, which the loss says.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = ""
    marker: ClassVar[str] = ""
    starts_at_base: bool = True
    goes_by_timestep: bool = False
    progress: float = 0.0
    x_start: Tensor | None = None

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        """A method that is yet to be trained; `facts` say how it will be, in words."""
        return cls()

    @abstractmethod
    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        """Set up the model for training.

        Returns:
            The optimizer's parameter groups: `params`, and `factor` on the learning rate.
        """

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the last forward adds to the denoising loss, and scalars worth logging."""
        return None, {}

    def check_start(self, start_from: str) -> None:  # noqa: B027
        """Refuse to train on from a directory, or, where that is empty, from the model.

        Raises:
            UserError: it cannot.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what was learned, and only that; the marker comes last."""

    @abstractmethod
    def load(self, model: nn.Module, directory: Path) -> None:
        """Put what `save` wrote on a fresh model."""

    def start_from(self, model: nn.Module, directory: Path) -> None:
        """After `prepare`: train on from what `save` wrote, in the same parameters."""
        self.load(model, directory)

    @classmethod
    def is_saved_in(cls, directory: Path) -> bool:
        """Whether `save` has been done there."""
        return bool(cls.marker) and (directory / cls.marker).exists()

    def close(self) -> None:  # noqa: B027
        """Take off the model what only training needs."""
