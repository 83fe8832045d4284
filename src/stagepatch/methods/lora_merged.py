"""Merged weights of a LoRA that are kept from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.checkpoints import is_offloaded
from stagepatch.methods.lora_stages import MergedForward


class MergedWeights:
    """The merged weights of one model at a time: made at the first forward of its turn, and used in those that follow.

    They are those that its LoRA would make in each forward (`LoRA.merge`), where that weighs no ranks by timestep.
    They are made anew where a parameter, a scale or what is on has changed. Of what is written through a parameter's
    `.data` torch keeps no count: it is seen when the model's turn comes anew. With gradients, and in what
    `torch.compile` traces, the model runs as it would without them. Its own weights are never touched.
    """

    def __init__(self) -> None:
        self._found: dict[nn.Module, list[MergedForward]] = {}
        self._model: nn.Module | None = None
        self._layers: list[MergedForward] = []
        self._drop()

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeights:
        return MergedWeights()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def turn_to(self, model: nn.Module | None) -> None:
        """Whose weights are kept from here on; another's are dropped."""
        if model is self._model:
            return
        self._model = model
        self._layers = [] if model is None else self._layers_of(model)
        self._drop()

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within it a forward of the model is done with them, where its turn it is."""
        if model is not self._model or torch.is_grad_enabled():
            yield
            return
        if self._now() != self._facts:
            self._make()
        for layer, weight in zip(self._layers, self._weights, strict=True):
            layer.kept = weight
        try:
            yield
        finally:
            for layer in self._layers:
                layer.kept = None

    def _layers_of(self, model: nn.Module) -> list[MergedForward]:
        if model not in self._found:
            # Offloaded, a model computes elsewhere than its weights lie before.
            parts = [] if is_offloaded(model) else [vars(part).get("forward") for part in model.modules()]
            found = [part for part in parts if isinstance(part, MergedForward)]
            self._found[model] = [layer for layer in found if layer.ranks.weigh is None]
        return self._found[model]

    def _drop(self) -> None:
        self._weights: list[Tensor | None] = []
        self._parameters: list[dict[str, Any]] = []  # of the modules whose weights they are made of
        self._memory: list[Tensor] = []  # of these: an address is no other tensor's as long as it is held
        self._facts: Any = None

    def _make(self) -> None:
        self._drop()
        for layer in self._layers:
            can_merge = layer.can_merge()
            self._weights.append(layer.ranks.merged_weight(layer.layer) if can_merge else None)
            self._parameters += layer.parameters() if can_merge else []
        self._memory = [parameters["weight"].detach() for parameters in self._parameters]
        self._facts = self._now()

    def _now(self) -> Any:
        """What they follow from, as it is now."""
        weights = [parameters["weight"] for parameters in self._parameters]
        try:
            versions = [(weight._version, weight.data_ptr()) for weight in weights]
        except RuntimeError:  # tensors made in inference mode keep no count of their changes
            return object()
        return versions, [layer.state() for layer in self._layers]
