"""Weights and a patch that train together: a model from scratch, with prompts (Table 6 of DMP, arXiv 2405.17825)."""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from stagepatch.methods.config import MethodConfig
from stagepatch.methods.dmp import DMP
from stagepatch.methods.finetune import WEIGHTS_NAME, Finetune
from stagepatch.patch import Patch, PatchConfig

PATCH, WEIGHTS = "patch", "weights"


class Joint(Finetune):
    """Trains every weight and a patch, each as it trains alone, by one optimizer; adds the patch's balance losses.

    The paper does not say how the two meet. Here nothing is cut off: the gate's gradient, that of the balance losses
    too, goes on into the model's timestep embedding.

    It saves 'patch/' and 'weights/', which open alone too; with a scheduler, a model directory with 'patch/' in it.

    Args:
        facts: how the patch is trained, in words, for its model card.
        scheduler: see `Finetune`.
    """

    name = "joint"
    kind = "weights and patch"
    marker = f"{WEIGHTS}/{WEIGHTS_NAME}"

    def __init__(
        self, config: PatchConfig | None = None, facts: dict[str, str] | None = None, scheduler: Any = None
    ) -> None:
        super().__init__(scheduler)
        self.dmp = DMP(config, {**(facts or {}), "weights": "trained together with it"})
        self.starts_at_base = self.dmp.starts_at_base

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(config.patch, facts)

    @property
    def patch(self) -> Patch:
        """The one that trains."""
        return self.dmp.patch

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        of_patch = self.dmp.prepare(model)
        return super().prepare(model) + of_patch

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        return self.dmp.extra_loss()

    def save(self, directory: Path) -> None:
        self.patch.made_for(self.model)  # whose weights have moved since the patch was made
        self.dmp.save(directory / PATCH)
        super().save(directory / WEIGHTS if self.scheduler is None else directory)

    def load(self, model: nn.Module, directory: Path) -> None:
        super().load(model, directory / WEIGHTS)
        self.dmp.load(model, directory / PATCH)

    def start_from(self, model: nn.Module, directory: Path) -> None:
        super().load(model, directory / WEIGHTS)
        self.dmp.start_from(model, directory / PATCH)
