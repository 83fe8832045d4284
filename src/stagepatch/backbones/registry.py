"""From a model's class to its description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stagepatch.backbones.base import Backbone
from stagepatch.errors import UserError

# (model, sample_size) -> description
Describe = Callable[[Any, Any], Backbone]
_DESCRIPTIONS: dict[str, Describe] = {}


def register(class_name: str, describe: Describe) -> None:
    """Let models of a class (and its subclasses) be patched.

    Args:
        class_name: the class's `__name__`.
        describe: takes a model, on any device, and the reference size of its input (None: the model's own), and
            returns its description.
    """
    _DESCRIPTIONS[class_name] = describe


def describe(model: nn.Module, sample_size: Any = None) -> Backbone:
    """The description of a model.

    Args:
        sample_size: size of the model's input [latent pixels] at which grids are counted, by default its own.

    Raises:
        UserError: no family is registered for the model's class or one of its parents.
    """
    for parent in type(model).__mro__:
        if parent.__name__ in _DESCRIPTIONS:
            return _DESCRIPTIONS[parent.__name__](model, sample_size)
    raise UserError(
        f"No description of {type(model).__name__} is known, so its sites cannot be found. Known: "
        f"{', '.join(sorted(_DESCRIPTIONS))}. Describe it with stagepatch.backbones.register('"
        f"{type(model).__name__}', function), as docs/adding-a-backbone.md shows."
    )


DENOISERS = ("transformer", "unet", "transformer_2", "prior", "decoder")


def find_denoiser(target: Any, component: str = "") -> nn.Module:
    """The denoiser of a diffusers pipeline, or the model itself; compiled or not.

    Args:
        component: the denoiser's name in a pipeline that has several.

    Raises:
        UserError: `target` is neither a model nor a pipeline with a denoiser, or one of several has to be named.
    """
    if isinstance(target, nn.Module):
        return _uncompiled(target)
    name = type(target).__name__
    found = [part for part in DENOISERS if isinstance(getattr(target, part, None), nn.Module)]
    if component:
        module = getattr(target, component, None)
        if not isinstance(module, nn.Module):
            raise UserError(f"{name} has no model '{component}'. Its denoisers: {', '.join(found) or 'none'}.")
        return _uncompiled(module)
    if not found:
        raise UserError(f"{name} is neither a model nor a pipeline with a transformer or unet.")
    if len(found) > 1:
        raise UserError(f"{name} has several denoisers, {', '.join(found)}: say which with component='{found[0]}'.")
    return _uncompiled(getattr(target, found[0]))


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model
