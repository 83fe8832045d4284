"""A DiT of elastic width and depth: which blocks, heads and hidden channels have a say in each range of timesteps."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stagepatch.models.pruning import Kept

GROUPS = 16  # hidden channels of an MLP go in so many groups
_START, _TEMPERATURE = 3.0, 0.4


def gumbel_sigmoid(logits: Tensor, generator: Generator) -> Tensor:
    """Gates 0 or 1 that are 1 with probability sigmoid(logit), with the gradient of sigmoid((logit + noise)/0.4)
    (straight-through; arXiv 1611.00712): the difference of two Gumbel variables is logistic."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((logits + torch.logit(uniform)) / _TEMPERATURE)
    return (soft > 0.5).to(soft) + (soft - soft.detach())


class Architectures(nn.Module):
    """An architecture for each of R ranges, as logits of what stays: blocks [R, L], heads [R, H], groups [R, G].

    Heads, and groups of hidden channels, are by rank: the k-th of each is a place in the order of importance of every
    block, so that all blocks of a range stay equally wide. Those of rank 0 stay always, and of blocks at least one.

    Args:
        ranks: of heads [L, H] and of hidden channels [L, M] in each range; see `ranks`.
    """

    of_heads: Tensor
    of_channels: Tensor

    def __init__(self, ranks: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        of_heads, of_channels = (torch.stack(list(each)) for each in zip(*ranks, strict=True))
        count, layers, heads = of_heads.shape
        self.groups = min(GROUPS, of_channels.shape[2])
        self.register_buffer("of_heads", of_heads)
        self.register_buffer("of_channels", of_channels * self.groups // of_channels.shape[2])  # a channel's group
        self.blocks, self.heads, self.channels = (
            nn.Parameter(torch.full((count, size), _START)) for size in (layers, heads, self.groups)
        )

    def draw(self, generator: Generator) -> list[Tensor]:
        """Gates of blocks, heads and groups, each 0 or 1 with a gradient."""
        drawn = [gumbel_sigmoid(logits, generator) for logits in (self.blocks, self.heads, self.channels)]
        return [drawn[0], *(_with_first(each) for each in drawn[1:])]

    def kept(self, gates: list[Tensor], number: int) -> Kept:
        """What stays in a range, by gates."""
        blocks, heads, channels = (each[number] > 0.5 for each in gates)
        return Kept(blocks, heads[self.of_heads[number]], channels[self.of_channels[number]])

    def costs(self, gates: list[Tensor], cost: BlockCost) -> Tensor:
        """FLOPs of the blocks in each range, [R], with the gates' gradients."""
        blocks, heads, channels = gates
        sizes = torch.bincount(self.of_channels[0, 0], minlength=self.groups).to(channels)
        width = cost.head * heads.sum(dim=1) + cost.channel * (channels * sizes).sum(dim=1)
        costs: Tensor = blocks.sum(dim=1) * (width + cost.rest)
        return costs

    def spend(self, cost: BlockCost, shares: Tensor, budget: float) -> list[Tensor]:
        """Gates of what a budget pays for: what has the highest logit first, passing over what is too dear.

        Args:
            shares: of the timesteps in each range, [R].
            budget: FLOPs of the blocks, in the mean over the timesteps: at least `cost.least`.
        """
        logits = [each.detach() for each in (self.blocks, self.heads, self.channels)]
        gates = [torch.zeros_like(each) for each in logits]
        gates[0].scatter_(1, logits[0].argmax(dim=1, keepdim=True), 1.0)
        gates[1:] = [_with_first(each) for each in gates[1:]]

        def is_paid() -> bool:
            return float((self.costs(gates, cost) * shares).sum()) <= budget * (1 + 1e-6)

        order = [
            (value, kind, place)
            for kind, each in enumerate(logits)
            for place, value in enumerate(each.flatten().tolist())
        ]
        for _, kind, place in sorted(order, key=lambda one: -one[0]):
            flat = gates[kind].view(-1)
            if not flat[place]:
                flat[place] = 1.0
                if not is_paid():
                    flat[place] = 0.0
        return gates


class BlockCost:
    """FLOPs of a block of a DiT, two for a multiplication with its addition: of a head, a hidden channel, the rest.

    Args:
        model: a DiT.
        tokens: N of a sample.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        width, heads, channels = (
            model.hidden_size,
            model.config.num_attention_heads,
            model.blocks[0].mlp.fc2.in_features,
        )
        size = model.blocks[0].attn.proj.in_features // heads
        self.head = 2.0 * (4 * tokens * width * size + 2 * tokens * tokens * size)
        self.channel = 2.0 * 2 * tokens * width
        self.rest = 2.0 * 6 * width * width  # the map of the condition
        self.whole = self.head * heads + self.channel * channels + self.rest
        self.least = self.head + self.channel * math.ceil(channels / min(GROUPS, channels)) + self.rest


class Gated(AbstractContextManager["Gated"]):
    """A DiT whose blocks, heads and hidden channels are weighed by a range's gates, each sample by its own range's.

    Args:
        model: a DiT.
        architectures: of the ranges.
        gates: that they drew.
        ranges: of each sample, [B].
    """

    def __init__(self, model: Any, architectures: Architectures, gates: list[Tensor], ranges: Tensor) -> None:
        blocks, heads, channels = gates
        pairs = ((heads, architectures.of_heads), (channels, architectures.of_channels))
        of_all = [each[ranges[:, None, None], places[ranges]] for each, places in pairs]
        self._handles = []
        for layer, block in enumerate(model.blocks):
            of_heads = of_all[0][:, layer].repeat_interleave(block.attn.proj.in_features // heads.shape[1], dim=1)
            for module, weights in ((block.attn.proj, of_heads), (block.mlp.fc2, of_all[1][:, layer])):
                self._handles.append(module.register_forward_pre_hook(partial(_weigh, weights.unsqueeze(1))))
            self._handles.append(block.register_forward_hook(partial(_blend, blocks[ranges, layer].view(-1, 1, 1))))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _weigh(weights: Tensor, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * weights.to(args[0]),)


def _blend(gate: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return args[0] + gate.to(output) * (output - args[0])


def _with_first(gates: Tensor) -> Tensor:
    """The first of each row is 1."""
    return torch.cat([torch.ones_like(gates[:, :1]), gates[:, 1:]], dim=1)
