"""From a model's class to its description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stagepatch.backbones.base import Backbone
from stagepatch.errors import UserError

_DESCRIPTIONS: dict[str, Callable[[Any], Backbone]] = {}


def register(class_name: str, describe: Callable[[Any], Backbone]) -> None:
    """Let models of a class (and its subclasses) be patched.

    Args:
        class_name: the class's `__name__`.
        describe: takes a model, on any device, and returns its description.
    """
    _DESCRIPTIONS[class_name] = describe


def describe(model: nn.Module) -> Backbone:
    """The description of a model.

    Raises:
        UserError: no family is registered for the model's class or one of its parents.
    """
    for parent in type(model).__mro__:
        if parent.__name__ in _DESCRIPTIONS:
            return _DESCRIPTIONS[parent.__name__](model)
    raise UserError(
        f"No description of {type(model).__name__} is known, so its sites cannot be found. Known: "
        f"{', '.join(sorted(_DESCRIPTIONS))}. Describe it with stagepatch.backbones.register('"
        f"{type(model).__name__}', function)."
    )


def find_denoiser(target: Any) -> nn.Module:
    """The denoiser of a diffusers pipeline (`transformer` or `unet`), or the model itself; compiled or not.

    Raises:
        UserError: `target` is neither a model nor a pipeline with a denoiser.
    """
    if isinstance(target, nn.Module):
        return _uncompiled(target)
    for name in ("transformer", "unet"):
        component = getattr(target, name, None)
        if isinstance(component, nn.Module):
            return _uncompiled(component)
    raise UserError(f"{type(target).__name__} is neither a model nor a pipeline with a transformer or unet.")


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model
