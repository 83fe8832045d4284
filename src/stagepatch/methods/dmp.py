"""DMP (arXiv 2405.17825): a patch on a frozen model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from stagepatch.core import UserError, read_json
from stagepatch.methods.base import Method
from stagepatch.methods.config import MethodConfig
from stagepatch.patch import Attachment, Patch, PatchConfig


class DMP(Method):
    """Trains a patch.

    Args:
        facts: how it is trained, in words, for the patch's model card.
    """

    name = "dmp"
    kind = "patch"
    marker = "config.json"

    def __init__(self, config: PatchConfig | None = None, facts: dict[str, str] | None = None) -> None:
        self.config = config or PatchConfig()
        self.facts = facts or {}
        gated = self.config.is_gated_prepending
        self.starts_at_base = gated or (self.config.position, self.config.initialization) == ("add", "zero")
        self.patch: Patch
        self._attachment: Attachment | None = None

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(config.patch, facts)

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        self._attach(Patch.create(model, self.config).train(), model)
        self.patch.facts = dict(self.facts)
        prompts = [*self.patch.prompts, *self.patch.head_gates]
        is_matched = self.config.matched_step and self.patch.gate is None
        step = 1.0 / self.patch.num_choices if is_matched else 1.0
        groups: list[dict[str, Any]] = [{"params": prompts, "factor": step}]
        if self.patch.gate is not None:
            factor = self.config.gate_learning_rate_factor
            groups.append({"params": list(self.patch.gate.parameters()), "factor": factor})
        return groups

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        terms = self.patch.balance_terms()
        if not terms:
            return None, {}
        logged = {name: term.detach() for name, term in terms.items()}
        return self.patch.balance_loss(terms), {**logged, "gate_entropy": self.patch.gate_entropy()}

    def save(self, directory: Path) -> None:
        self.patch.save_pretrained(directory)

    def load(self, model: nn.Module, directory: Path) -> None:
        self._attach(Patch.from_pretrained(directory), model)

    def start_from(self, model: nn.Module, directory: Path) -> None:
        saved = Patch.from_pretrained(directory)
        if saved.config != self.patch.config:
            raise UserError(f"'{directory}' holds a patch of another config: give its 'patch' to train on from it.")
        self.patch.load_state_dict(saved.state_dict())

    @classmethod
    def is_saved_in(cls, directory: Path) -> bool:
        return super().is_saved_in(directory) and "patch" in read_json(directory / cls.marker)

    def _attach(self, patch: Patch, model: nn.Module) -> None:
        """Put a patch on in place of this method's former one, as when a stopped run goes on in one process."""
        if self._attachment is not None:
            self._attachment.detach()
        self.patch = patch
        self._attachment = patch.attach(model)


class PromptTuning(DMP):
    """Trains prompts without a gate (DMP, Eq. 2)."""

    name = "prompt_tuning"

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(replace(config.patch, gate="none"), facts)
