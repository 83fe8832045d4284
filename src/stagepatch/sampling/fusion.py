"""Two denoisers that run side by side, their features mixed: MaxFusion (arXiv 2404.09977), after its released code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families import Site, describe
from stagepatch.sampling.stand_in import combine

AGREEMENT = 0.7  # correlation above which two models say the same of a place
_DIMENSIONS = {"tokens": (2, (1,)), "sequence": (2, (0,)), "map": (1, (2, 3))}  # of channels, and of places


def maxfusion(first: Tensor, second: Tensor, layout: str = "map", rescale: bool = True) -> tuple[Tensor, Tensor]:
    """The features of two models, mixed place by place: what the first goes on with, and the second.

    Where they agree (correlation over channels above 0.7), both go on with their mean. Elsewhere both go on with
    those of the one whose variance over channels is the larger, as a share of its sum over the sample's places; the
    other model takes them times its own standard deviation over that one's.

    Args:
        first, second: of one shape.
        layout: see `Site`.
        rescale: False leaves out that factor.
    """
    channels, places = _DIMENSIONS[layout]
    precise = torch.promote_types(first.dtype, torch.float32)
    one, other = first.to(precise), second.to(precise)
    variances = [features.var(channels, correction=0, keepdim=True) for features in (one, other)]
    shares = [variance / variance.sum(places, keepdim=True) for variance in variances]
    centred = [features - features.mean(channels, keepdim=True) for features in (one, other)]
    agrees = torch.cosine_similarity(centred[0], centred[1], dim=channels).unsqueeze(channels) > AGREEMENT
    is_first = shares[0] >= shares[1]
    # Features without any spread have none to be brought to.
    ratio = (variances[0] / variances[1]).sqrt() if rescale else torch.ones_like(variances[0])
    ratio = ratio.where((variances[0] > 0) & (variances[1] > 0), 1.0)
    taken = one.where(is_first, other * ratio), (one / ratio).where(is_first, other)
    mean = (one + other) / 2
    return mean.where(agrees, taken[0]).to(first.dtype), mean.where(agrees, taken[1]).to(second.dtype)


class SideBySide:
    """Calls two models at once, each in a thread of its own. Where hidden states enter a block, and after the last
    block, they wait for each other and go on with what `maxfusion` makes of both; a U-Net's skip connections are
    mixed where they enter. The answer is the mean of both.

    Args:
        models: of the same blocks.

    Raises:
        UserError: their blocks differ.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        own, other = (describe(model).sites for model in models)
        self._sites = [site for site in own if site.kind == own[0].kind]
        facts = [[(site.module, site.channels, site.layout) for site in sites] for sites in (own, other)]
        if facts[0] != facts[1]:
            raise UserError("Features are mixed where they enter a block: both models must have the same blocks.")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, calls: Sequence[Callable[[], Any]]) -> Any:
        """The answer of two calls, one of each model.

        Raises:
            UserError: they do not come through their blocks alike, or it does not show, as in a compiled model.
        """
        meeting = _Meeting()
        with ExitStack() as hooks, ThreadPoolExecutor(1) as thread:
            for number, model in enumerate(self._models):
                blocks = [(site, model.get_submodule(site.module)) for site in self._sites]
                for site, block in blocks:
                    enter = partial(meeting.enter, number, site)
                    hooks.callback(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
                last, block = blocks[-1]
                hooks.callback(block.register_forward_hook(partial(meeting.leave, number, last)).remove)
            device = next(self._models[0].parameters()).device
            second = thread.submit(_as_here(device, partial(meeting.attend, 1, calls[1])))
            try:
                first = meeting.attend(0, calls[0])
            except threading.BrokenBarrierError:
                second.result()  # raises what broke it
                raise
            return combine(lambda one, other: (one + other) / 2, first, second.result())


class _Meeting:
    """Two threads hand in features at each place, and each goes on with its mixture. An error in one ends both."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, action=self._mix)
        self._given: list[Any] = [None, None]
        self._mixed: Sequence[Any] = ()

    def attend(self, number: int, call: Callable[[], Any]) -> Any:
        """A call that meets the other on its way, and at its end."""
        try:
            answer = call()
            self._meet(number, ("", "", False), None)
        except BaseException:
            self._barrier.abort()
            raise
        return answer

    def enter(self, number: int, site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a block."""

        def mixed(name: Any, value: Any) -> Any:
            if name in (0, site.argument) or (site.layout == "map" and isinstance(value, tuple)):  # skip connections
                return self._meet(number, (site.module, site.layout, True), value)
            return value

        return tuple(mixed(*each) for each in enumerate(args)), {name: mixed(name, kwargs[name]) for name in kwargs}

    def leave(self, number: int, site: Site, block: nn.Module, args: Any, output: Any) -> Any:
        """After the last block."""
        return self._meet(number, (site.module, site.layout, False), output)

    def _meet(self, number: int, place: tuple[str, str, bool], features: Any) -> Any:
        if isinstance(features, tuple):
            return tuple(self._meet(number, place, each) if isinstance(each, Tensor) else each for each in features)
        self._given[number] = place, features
        self._barrier.wait()
        return self._mixed[number]

    def _mix(self) -> None:
        """Done by one of the threads when both have come."""
        (place, first), (other_place, second) = self._given
        module, layout, rescale = place
        if place != other_place or not (module or self._mixed):
            raise UserError(
                "The models cannot be mixed: they do not come through their blocks alike, or are compiled."
            )
        self._mixed = maxfusion(first, second, layout, rescale) if module else (None, None)


def _as_here(device: torch.device, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call for another thread, with this one's modes, which are a thread's own."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = device.type
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def run() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), autocast, torch.cuda.stream(stream):
            return call()

    return run
