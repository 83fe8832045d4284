"""DeMe's channel-wise projection (arXiv 2410.06664, supplement): a C×C map after each stage, the identity at first.

In a U-Net a bias-free 1×1 convolution on what each stage hands on, its skip connection included; in a token model a
D×D linear map on the input of each site. Where a stage ends in a convolution, the map can be folded into it, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from stagepatch.backbones import describe


class ChannelProjection(nn.Module):
    """Projections for a model, put on by `attach`.

    Args:
        model: a U-Net, or a model of tokens, of a family that `describe` knows.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        sites = [site for site in describe(model).sites if site.kind != "attention"]
        self.is_map = sites[0].layout == "map"
        self.paths = [site.module for site in sites]
        widths = _widths_after(model, self.paths) if self.is_map else [site.channels for site in sites]
        self.maps = nn.ParameterList(nn.Parameter(torch.eye(width)) for width in widths)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the projections on a model; each handle's `remove()` takes one off."""
        handles = []
        for path, weight in zip(self.paths, self.maps, strict=True):
            module = model.get_submodule(path)
            if self.is_map:
                handles.append(module.register_forward_hook(_After(weight)))
            else:
                handles.append(module.register_forward_pre_hook(_Before(weight), with_kwargs=True))
        return handles

    def fold(self, model: nn.Module) -> list[str]:
        """Multiply the projections into the convolutions that stages end in, and make them the identity.

        Returns:
            Paths of the stages that do not end in a convolution, whose projections stay.
        """
        left = []
        with torch.no_grad():
            for path, weight in zip(self.paths, self.maps, strict=True):
                last = _last_convolution(model.get_submodule(path)) if self.is_map else None
                if last is None:
                    left.append(path)
                    continue
                last.weight.copy_(torch.einsum("oc,cihw->oihw", weight.double(), last.weight.double()))
                if last.bias is not None:
                    last.bias.copy_(weight.double() @ last.bias.double())
                weight.copy_(torch.eye(len(weight)))
        return left


class _After:
    """On a stage's output: a map, or (map, skip connections), of which the last is that map."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return self._project(output)
        hidden_states, skips = output[0], output[1]
        projected = self._project(hidden_states)
        if skips and skips[-1] is hidden_states:
            skips = (*skips[:-1], projected)
        return (projected, skips, *output[2:])

    def _project(self, hidden_states: Tensor) -> Tensor:
        return F.conv2d(hidden_states, self.weight.to(hidden_states.dtype)[:, :, None, None])


class _Before:
    """On a block's input [B, N, D]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "hidden_states"
        if args:
            return (self._project(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: self._project(kwargs[name])}

    def _project(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


def _widths_after(model: Any, paths: list[str]) -> list[int]:
    """Channels that each stage of a U-Net puts out."""
    widths = list(model.config.block_out_channels)
    down = dict(zip((f"down_blocks.{number}" for number in range(len(widths))), widths, strict=True))
    up = dict(zip((f"up_blocks.{number}" for number in range(len(widths))), reversed(widths), strict=True))
    after = {**down, "mid_block": widths[-1], **up}
    return [after[path] for path in paths]


def _last_convolution(stage: Any) -> nn.Conv2d | None:
    """The convolution that makes a stage's output, if it ends in one."""
    for name in ("downsamplers", "upsamplers"):
        samplers = getattr(stage, name, None)
        if samplers is not None:
            convolution = getattr(samplers[-1], "conv", None)
            return convolution if isinstance(convolution, nn.Conv2d) else None
    return None
