"""Prompts prepended behind a gate: attended to apart, and added times tanh of a gate per head that starts at zero.

As in LLaMA-Adapter (arXiv 2303.16199, Sec. 3.2), so that the model starts exactly as it was: a block's attention to
its own tokens keeps its softmax.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError
from stagepatch.families import Attention
from stagepatch.patch.mixture import no_autocast
from stagepatch.patch.prompts import MixtureOfPrompts


class PromptedAttention:
    """One attention's queries, from the layer that makes them to the layer that takes the heads' outputs."""

    def __init__(
        self, patch: MixtureOfPrompts, position: int, attention: Attention, modules: dict[str, nn.Module]
    ) -> None:
        self.patch = patch
        self.position = position
        self.heads = attention.heads
        layers = (attention.query, attention.key, attention.value, attention.out)
        self.query, self.key, self.value, self.out = (modules[name] for name in layers)
        self.norms = [modules[name] if name else None for name in (attention.query_norm, attention.key_norm)]
        self.queries: Tensor | None = None

    def keep_queries(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.patch.enabled:
            self.queries = output

    def attend(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add what the queries see in the prompts to the heads' outputs."""
        if not self.patch.enabled:
            return None
        patch, queries = self.patch, self.queries
        if queries is None:
            name = patch.backbone.sites[self.position].name
            raise UserError(
                f"The attention of '{name}' did not show its queries: call unfuse_qkv_projections() first."
            )
        prompts = patch.mixture_like(queries, self.position)
        with no_autocast(queries):
            gate = torch.tanh(patch.head_gates[self.position]) * patch.scale
        if self.key is self.value:  # one layer for all three
            queries, (_, keys, values) = queries.chunk(3, dim=-1)[0], self.key(prompts).chunk(3, dim=-1)
        else:
            keys, values = self.key(prompts), self.value(prompts)
        self.queries = None  # a fused layer has just shown the prompts' own
        projected = (queries, keys, values)
        query, key, value = (tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tensor in projected)
        query, key = (norm(tensor) if norm else tensor for norm, tensor in zip(self.norms, (query, key), strict=True))
        seen = F.scaled_dot_product_attention(query, key, value.to(query.dtype))
        seen = seen * gate.to(seen.dtype).view(-1, 1, 1)
        return (args[0] + seen.transpose(1, 2).flatten(2).to(args[0].dtype), *args[1:])
