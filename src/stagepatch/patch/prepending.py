"""Prompts prepended behind a gate: attended to apart, and added times tanh of a gate per head that starts at zero.

As in LLaMA-Adapter (arXiv 2303.16199, Sec. 3.2), so that the model starts exactly as it was: a block's attention to
its own tokens keeps its softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stagepatch.core.errors import UserError
from stagepatch.families import Attention
from stagepatch.patch.mixture import mix, no_autocast

if TYPE_CHECKING:
    from stagepatch.patch.patch import Patch


def attend_to_prompts(
    patch: Patch, position: int, attention: Attention | None, modules: dict[str, nn.Module]
) -> list[RemovableHandle]:
    """Let a site's attention see the patch's prompts."""
    assert attention is not None, "select_sites takes only sites with an attention here"
    norms = [modules[name] if name else None for name in (attention.query_norm, attention.key_norm)]
    asked = _Prompted(patch, position, attention.heads, modules[attention.key], modules[attention.value], norms)
    return [
        modules[attention.query].register_forward_hook(_Query(asked)),
        modules[attention.out].register_forward_pre_hook(_Out(asked)),
    ]


class _Prompted:
    """One attention's queries, from the layer that makes them to the layer that takes the heads' outputs."""

    def __init__(
        self,
        patch: Patch,
        position: int,
        heads: int,
        key: nn.Module,
        value: nn.Module,
        norms: list[nn.Module | None],
    ) -> None:
        self.patch = patch
        self.position = position
        self.heads = heads
        self.key = key
        self.value = value
        self.norms = norms
        self.queries: Tensor | None = None
        self.projecting = False

    def project(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        self.projecting = True
        try:
            keys = self.key(prompts)
            if self.key is self.value:
                _, keys, values = keys.chunk(3, dim=-1)
                return keys, values
            return keys, self.value(prompts)
        finally:
            self.projecting = False

    def add(self, heads_output: Tensor) -> Tensor:
        if self.queries is None:
            name = self.patch.backbone.sites[self.position].name
            raise UserError(
                f"The attention of '{name}' did not show its queries: call unfuse_qkv_projections() first."
            )
        patch, queries, self.queries = self.patch, self.queries, None
        weights = None if patch.last is None else patch.last.weights[self.position]
        with no_autocast(queries):
            prompts = mix(patch.prompts[self.position], weights)
            gate = torch.tanh(patch.head_gates[self.position]) * patch.scale
        prompts = prompts.to(queries.dtype).expand(queries.shape[0], -1, -1)
        projected = [queries.chunk(3, dim=-1)[0] if self.key is self.value else queries, *self.project(prompts)]
        query, key, value = (tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in projected)
        query, key = (norm(tensor) if norm else tensor for norm, tensor in zip(self.norms, (query, key), strict=True))
        seen = F.scaled_dot_product_attention(query, key, value.to(query.dtype))
        seen = seen * gate.to(seen.dtype).view(-1, 1, 1)
        return heads_output + seen.transpose(1, 2).flatten(2).to(heads_output.dtype)


class _Query:
    def __init__(self, prompted: _Prompted) -> None:
        self.prompted = prompted

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.prompted.patch.enabled and not self.prompted.projecting:
            self.prompted.queries = output


class _Out:
    def __init__(self, prompted: _Prompted) -> None:
        self.prompted = prompted

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.prompted.patch.enabled:
            return None
        return (self.prompted.add(args[0]), *args[1:])
