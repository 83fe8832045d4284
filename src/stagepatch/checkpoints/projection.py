"""DeMe's channel-wise projection (arXiv 2410.06664, supplement): a C×C map after each stage, the identity at first.

In a U-Net a bias-free 1×1 convolution on what each stage hands on, its skip connection included; in a token model a
D×D linear map on the input of each site. They are a part of the model, `stagepatch_projection`, so whatever moves,
averages, saves or merges its parameters takes them along. Where a stage ends in a convolution, the map can be folded
into it, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stagepatch.core import UserError
from stagepatch.families import describe

# Where a model holds its projections; their names in its weights' file begin with this.
PROJECTION = "stagepatch_projection"


def add_projections(model: nn.Module, numbers: Iterable[int] | None = None) -> ChannelProjection:
    """Put projections on a model, as a part of it.

    Args:
        model: a U-Net, or a model of tokens, of a family that `describe` knows.
        numbers: of the stages or sites that get one, by default all.

    Raises:
        UserError: a number that none has.
    """
    projection = ChannelProjection(model, numbers)
    model.add_module(PROJECTION, projection)
    return projection


def fold_projections(model: nn.Module) -> list[str]:
    """Multiply projections into the convolutions that stages end in, and take those off the model.

    Returns:
        Paths of the stages or sites that do not end in a convolution, whose projections stay.
    """
    projection: Any = getattr(model, PROJECTION, None)
    if projection is None:
        return []
    for number in list(projection.maps):
        last = _last_convolution(model.get_submodule(projection.paths[int(number)])) if projection.is_map else None
        if last is None:
            continue
        weight = projection.maps.pop(number).detach().double()
        last.weight.data.copy_(torch.einsum("oc,cihw->oihw", weight, last.weight.detach().double()))
        if last.bias is not None:
            last.bias.data.copy_(weight @ last.bias.detach().double())
        projection.handles.pop(number).remove()
    if not projection.maps:
        delattr(model, PROJECTION)
    return [projection.paths[int(number)] for number in projection.maps]


class ChannelProjection(nn.Module):
    """The maps [C, C], one a stage or site, and the hooks that apply them. Made by `add_projections`."""

    def __init__(self, model: Any, numbers: Iterable[int] | None = None) -> None:
        super().__init__()
        sites = [site for site in describe(model).sites if site.kind != "attention"]
        self.is_map = sites[0].layout == "map"
        self.paths = [site.module for site in sites]
        widths = [site.channels for site in sites]
        if self.is_map:  # what a stage puts out is what the next one takes
            widths = [*widths[1:], model.config.block_out_channels[0]]
        numbers = range(len(sites)) if numbers is None else sorted(numbers)
        if odd := [number for number in numbers if not 0 <= number < len(sites)]:
            raise UserError(f"There is no stage or site {odd[0]}: {type(model).__name__} has {len(sites)}.")
        self.maps = nn.ParameterDict({str(number): nn.Parameter(torch.eye(widths[number])) for number in numbers})
        self.handles = {number: self._attach(model, number) for number in self.maps}

    def _attach(self, model: nn.Module, number: str) -> RemovableHandle:
        module = model.get_submodule(self.paths[int(number)])
        if self.is_map:
            return module.register_forward_hook(partial(self._project_output, number))
        return module.register_forward_pre_hook(partial(self._project_input, number), with_kwargs=True)

    def _project_output(self, number: str, module: nn.Module, args: Any, output: Any) -> Any:
        """Of a stage: a map, or (map, skip connections), of which the last is that map."""
        hidden_states, *others = (output,) if isinstance(output, Tensor) else output
        projected = F.conv2d(hidden_states, self.maps[number].to(hidden_states.dtype)[:, :, None, None])
        if isinstance(output, Tensor):
            return projected
        skips = others[0]
        if skips and skips[-1] is hidden_states:
            skips = (*skips[:-1], projected)
        return (projected, skips, *others[1:])

    def _project_input(self, number: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a block: [B, N, D]."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        projected = F.linear(hidden_states, self.maps[number].to(hidden_states.dtype))
        return ((projected, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": projected})


def _last_convolution(stage: Any) -> nn.Conv2d | None:
    """The convolution that makes a stage's output, if it ends in one."""
    samplers = getattr(stage, "downsamplers", None) or getattr(stage, "upsamplers", None) or [None]
    convolution = getattr(samplers[-1], "conv", None)
    return convolution if isinstance(convolution, nn.Conv2d) else None
