"""The vocabulary of a backbone's description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Site:
    """A place where hidden states enter a block.

    Args:
        name: how the site is called in a patch's file, such as 'blocks.0'.
        module: path of the block in the model; its first input (or `argument`) is the hidden states.
        index: the block's number, which the gate sees.
        channels: D.
        grid: height and width of the hidden states at the model's own sample size.
        layout: 'tokens' [B, N, D] with N = height · width, or 'map' [B, D, height, width].
        argument: the hidden states' name where the block takes them by keyword.
    """

    name: str
    module: str
    index: int
    channels: int
    grid: tuple[int, int]
    layout: Literal["tokens", "map"] = "tokens"
    argument: str = "hidden_states"

    @property
    def num_tokens(self) -> int:
        """N"""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Backbone:
    """Where a model can be patched.

    Args:
        model_class: the model's class.
        sites: in the order in which the forward pass meets them.
        time_tap: path of the module whose output [B, C] is the timestep embedding t.
        condition_taps: paths of the modules whose outputs [B, C], summed and added to t, give t+c.
        condition_channels: C.
    """

    model_class: str
    sites: tuple[Site, ...]
    time_tap: str
    condition_taps: tuple[str, ...]
    condition_channels: int
