"""The gate: logits over the choices (prompts, or prompt sets) for all blocks at once, or attention in its place.

The gates of logits see the condition embedding with the block's index appended (Eq. 3). The index only shifts the
logits, so one matrix product serves every block.
"""

import math
from dataclasses import replace

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.patch.config import PatchConfig


class LinearGate(nn.Module):
    """One linear layer, shared by the blocks: [B, C] -> [L, B, M] for M choices.

    `weight` is [M, C+1] with the block's index as last feature (or [M, C] without it), `bias` [M]. Noise does not see
    the index, as in the released code: `noise_weight` is [M, C].
    """

    indices: Tensor

    def __init__(self, config: PatchConfig, channels: int, num_choices: int, block_indices: list[int]) -> None:
        super().__init__()
        shape = (num_choices, channels + config.block_index)
        self.channels = channels
        self.weight = _initial(shape, config)
        self.bias = nn.Parameter(torch.zeros(num_choices))
        self.noise_weight = nn.Parameter(torch.zeros(num_choices, channels)) if config.gate_noise else None
        indices = torch.tensor(block_indices, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, condition: Tensor) -> Tensor:
        return self._project(condition, self.weight, self.bias)

    def noise_std(self, condition: Tensor) -> Tensor | None:
        """Standard deviation of the logits' noise, [L, B, M], alike for all (arXiv 1701.06538, Eq. 4; floor 0.01)."""
        if self.noise_weight is None:
            return None
        return F.softplus(self._project(condition, self.noise_weight)) + 0.01

    def _project(self, condition: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[condition; index] · weightᵀ + bias for every index: [L, B, M]."""
        shared = F.linear(condition, weight[:, : self.channels], bias).unsqueeze(0)
        if weight.shape[1] == self.channels:
            return shared.expand(len(self.indices), -1, -1)
        return shared + self.indices.to(weight.dtype) * weight[:, self.channels]


class LearnedKeysGate(LinearGate):
    """Scaled dot products of a query, linear in the condition, with a learned key per choice: a gate of ours.

    `query_weight` is [C, C+1] and zero at the start, `keys` [M, C] normal, so all choices start equal.
    """

    def __init__(self, config: PatchConfig, channels: int, num_choices: int, block_indices: list[int]) -> None:
        super().__init__(replace(config, gate_initialization="zero"), channels, num_choices, block_indices)
        del self.weight, self.bias
        self.query_weight = _initial((channels, channels + config.block_index), config)
        self.keys = nn.Parameter(torch.randn(num_choices, channels))

    def forward(self, condition: Tensor) -> Tensor:
        keys = self.keys / math.sqrt(self.channels)
        return self._project(condition, keys @ self.query_weight)


class AttentionGate(nn.Module):
    """Attention of a site's prompts to the timestep, which gives what is added there: a reading of Table 4a.

    Its text has prompts as queries and timestep embeddings as keys and values, whose output is the weighted prompts.
    To one key a softmax is 1 and the prompts are not heard. So there are two here: the condition embedding, and the
    sinusoidal embedding of the block's index, which the paper's other gate is given as well (Table 4c). `query` is
    [C, D], `key` [C, C], `value` [D, C], of one head; zero values at the start leave the model as it was.
    """

    indices: Tensor

    def __init__(self, config: PatchConfig, channels: int, width: int, block_indices: list[int]) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(channels, width) / math.sqrt(width))
        self.key = nn.Parameter(torch.randn(channels, channels) / math.sqrt(channels))
        self.value = _initial((width, channels), config)
        indices = get_timestep_embedding(torch.tensor(block_indices), channels, downscale_freq_shift=0)
        self.register_buffer("indices", indices, persistent=False)

    def sources(self, condition: Tensor) -> Tensor:
        """What the prompts attend to: condition [B, C] -> [L, B, 2, C]."""
        shape = len(self.indices), *condition.shape
        indices = self.indices.to(condition.dtype).unsqueeze(1)
        return torch.stack([condition.expand(shape), indices.expand(shape)], dim=2)

    def attend(self, prompts: Tensor, sources: Tensor) -> Tensor:
        """Prompts [N, D] and a site's sources [B, 2, C] -> [B, N, D]."""
        queries = F.linear(prompts, self.query).expand(len(sources), -1, -1)
        keys, values = F.linear(sources, self.key), F.linear(sources, self.value)
        return F.scaled_dot_product_attention(queries, keys, values)


def _initial(shape: tuple[int, int], config: PatchConfig) -> nn.Parameter:
    if config.gate_initialization == "zero":
        return nn.Parameter(torch.zeros(shape))
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[1]))
