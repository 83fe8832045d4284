"""The gate: logits over the choices (prompts, or prompt sets) for all blocks at once.

Both gates see the condition embedding with the block's index appended (Eq. 3). The index only shifts the logits,
so one matrix product serves every block.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearGate(nn.Module):
    """One linear layer, shared by the blocks: [B, C] -> [L, B, M] for M choices.

    `weight` is [M, C+1] with the block's index as last feature (or [M, C] without it), `bias` [M]; with noise,
    `noise_weight` has the shape of `weight`.
    """

    indices: Tensor

    def __init__(
        self,
        channels: int,
        num_choices: int,
        block_indices: list[int],
        block_index: bool,
        noise: bool,
        initialization: Literal["zero", "normal"],
    ) -> None:
        super().__init__()
        features = channels + block_index
        self.channels = channels
        self.weight = nn.Parameter(_initial((num_choices, features), initialization, features))
        self.bias = nn.Parameter(torch.zeros(num_choices))
        self.noise_weight = nn.Parameter(torch.zeros(num_choices, features)) if noise else None
        self.register_buffer("indices", _column(block_indices), persistent=False)

    def forward(self, condition: Tensor) -> Tensor:
        return _project(condition, self.weight, self.bias, self.indices, self.channels)

    def noise_std(self, condition: Tensor) -> Tensor | None:
        """Standard deviation of the logits' noise, [L, B, M] (arXiv 1701.06538, Eq. 4; floor 0.01)."""
        if self.noise_weight is None:
            return None
        raw = _project(condition, self.noise_weight, None, self.indices, self.channels)
        return F.softplus(raw) + 0.01


class AttentionGate(LinearGate):
    """Scaled dot products of a query, linear in the condition, with a learned key per choice.

    The paper (Table 4a) does not say more of its attention gate. Here `query_weight` is [C, C+1] and zero at the
    start, `keys` [M, C] normal, so all choices start equal.
    """

    def __init__(
        self,
        channels: int,
        num_choices: int,
        block_indices: list[int],
        block_index: bool,
        noise: bool,
        initialization: Literal["zero", "normal"],
    ) -> None:
        super().__init__(channels, num_choices, block_indices, block_index, noise, "zero")
        features = channels + block_index
        del self.weight, self.bias
        self.query_weight = nn.Parameter(_initial((channels, features), initialization, features))
        self.keys = nn.Parameter(torch.randn(num_choices, channels))

    def forward(self, condition: Tensor) -> Tensor:
        keys = self.keys / math.sqrt(self.channels)
        return _project(condition, keys @ self.query_weight, None, self.indices, self.channels)


def _initial(shape: tuple[int, ...], initialization: Literal["zero", "normal"], features: int) -> Tensor:
    if initialization == "zero":
        return torch.zeros(shape)
    return torch.randn(shape) / math.sqrt(features)


def _column(indices: list[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1)


def _project(condition: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, channels: int) -> Tensor:
    """[condition; index] · weightᵀ + bias for every index: [L, B, M]."""
    shared = F.linear(condition, weight[:, :channels], bias).unsqueeze(0)
    if weight.shape[1] == channels:
        return shared.expand(indices.shape[0], -1, -1)
    return shared + indices.to(weight.dtype) * weight[:, channels]
