"""Denoising task routing (DTR, arXiv 2310.07138): at each timestep a block works on some of the channels alone.

The active channels are a window that slides from the first channels, at timestep 0, to the last, at T − 1. A block
sees zeros in the others, and what was in these is added to what it puts out: m⊙x goes in, block(m⊙x) + (1 − m)⊙x comes
out, the same m at every block and token. There is nothing to learn. The windows are a part of the model,
`stagepatch_routing`, so whatever loads, copies or saves its weights takes them along.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families import describe
from stagepatch.families.registry import NUM_TIMESTEPS, family_of

ROUTING = "stagepatch_routing"
# Their name in the file of the model's weights.
WINDOWS = f"{ROUTING}.windows"


def routing_windows(channels: int, num_train_timesteps: int, share: float, shift: float) -> Tensor:
    """First active channel, and the first one after, at every timestep: [T, 2].

    Of C channels C_β = ⌊βC⌋ are active, from round((C − C_β)·(t/(T − 1))^α) on (the released code; the paper counts t
    from 1).

    Args:
        channels: C.
        share: β (DTR: 0.8).
        shift: α; above 1 the window moves more the more noise there is (DTR: 4).
    """
    active = int(channels * share)
    places = np.linspace(0.0, 1.0, num_train_timesteps) ** shift
    first = torch.from_numpy((places * (channels - active)).round().astype(np.int64))
    return torch.stack([first, first + active], dim=1)


def add_routing(
    model: nn.Module, share: float = 0.8, shift: float = 4.0, num_train_timesteps: int = 1000
) -> ChannelRouting:
    """Put routing on a model, as a part of it.

    Args:
        model: of tokens, of a family that `describe` knows, whose blocks give back hidden states alone, as a DiT's.
        share, shift, num_train_timesteps: see `routing_windows`.

    Raises:
        UserError: a share or shift that is out of range, or a model without blocks of tokens.
    """
    if not 0.0 < share <= 1.0 or shift <= 0.0:
        raise UserError(f"A routed share={share} must be above 0 and at most 1, and its shift={shift} above 0.")
    channels = _sites(model)[0].channels
    if int(channels * share) < 1:
        raise UserError(f"A routed share={share} of {channels} channels is none: give more.")
    return attach_routing(model, routing_windows(channels, num_train_timesteps, share, shift))


def attach_routing(model: nn.Module, windows: Tensor) -> ChannelRouting:
    """Put routing by these windows [T, 2] on a model, as a part of it.

    Raises:
        UserError: windows of another shape.
    """
    if windows.ndim != 2 or windows.shape[1] != 2 or not len(windows) or windows.is_floating_point():
        raise UserError(
            f"Windows of routing are {list(windows.shape)} of {windows.dtype}: expected [T, 2] of integers."
        )
    routing = ChannelRouting(model, windows)
    model.add_module(ROUTING, routing)
    return routing


class ChannelRouting(nn.Module):
    """The windows [T, 2], and what applies them. Made by `add_routing`.

    It stands in for the blocks' own forwards, so hooks on a block (projections, patches) work on what goes into the
    routed block and on what comes out. Between a forward with gradient checkpointing and its backward, run no other
    forward.
    """

    windows: Tensor

    def __init__(self, model: Any, windows: Tensor) -> None:
        super().__init__()
        if hasattr(model, ROUTING):
            raise UserError("The model's channels are routed already.")
        sites = _sites(model)
        self.register_buffer("windows", windows)
        self.mask: Tensor | None = None  # active channels of the forward that is under way, [B or 1, 1, C]
        self._channels = sites[0].channels
        self._names = list(inspect.signature(model.forward).parameters)
        family = family_of(type(model))
        self._timestep, self._levels = family.timestep_argument, family.sample_levels
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for site in sites:
            block: Any = model.get_submodule(site.module)
            block.forward = _RoutedForward(self, block, site.argument)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look up the window of each sample's timestep, the nearest of 0 to T − 1."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        level = self._levels(torch.as_tensor(given[self._timestep], device=self.windows.device).float())
        timesteps = (level * NUM_TIMESTEPS).round().long().clamp(0, len(self.windows) - 1)
        first, stop = self.windows[timesteps].view(-1, 1, 1, 2).unbind(dim=-1)
        channels = torch.arange(self._channels, device=first.device)
        self.mask = (first <= channels) & (channels < stop)


class _RoutedForward:
    """Stands in for a block's forward."""

    def __init__(self, routing: ChannelRouting, block: nn.Module, argument: str) -> None:
        self.routing = routing
        self.block = block
        self.argument = argument

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states: Tensor = args[0] if args else kwargs[self.argument]
        mask = self.routing.mask
        assert mask is not None, "the model's forward comes first"
        routed = hidden_states.where(mask, 0.0)
        if args:
            args = (routed, *args[1:])
        else:
            kwargs = {**kwargs, self.argument: routed}
        output: Any = type(self.block).forward(self.block, *args, **kwargs)
        if not isinstance(output, Tensor):
            name = type(self.block).__name__
            raise UserError(f"Channels cannot be routed through a {name}: it gives back more than hidden states.")
        return output.where(mask, output + hidden_states)


def _sites(model: Any) -> Any:
    sites = [site for site in describe(model).sites if site.kind == "block" and site.layout == "tokens"]
    if not sites:
        raise UserError(f"Channels are routed through blocks of tokens; {type(model).__name__} has none.")
    return sites
