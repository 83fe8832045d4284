"""From a model's class to its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stagepatch.core.errors import UserError
from stagepatch.families.base import Backbone

# (model, sample_size) -> description
Describe = Callable[[Any, Any], Backbone]
# (model, sample [B, C, H, W], timesteps [B] on the scheduler's scale, condition) -> output [B, C or 2C, H, W]
Call = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
# (pipeline without denoiser and VAE, captions) -> a denoiser's condition, each tensor a row per caption
EncodeCaptions = Callable[[Any, list[str]], dict[str, Tensor]]


# the model's `timestep` argument [B] -> 0 (an image) to 1 (noise)
NoiseLevel = Callable[[Tensor], Tensor]


def in_thousands(timestep: Tensor) -> Tensor:
    """The noise level of a model that is told timesteps of 0 to 1000."""
    return timestep / 1000.0


def in_ones(timestep: Tensor) -> Tensor:
    """The noise level of a model that is told timesteps of 0 to 1."""
    return timestep


def call_plainly(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """The way most models are called: the condition by keywords."""
    output: tuple[Tensor, ...] = model(sample, timestep=timesteps, return_dict=False, **condition)
    return output[0]


@dataclass(frozen=True)
class Family:
    """What there is to know of a class of models. To patch them, `describe` alone is needed; to train, all."""

    describe: Describe
    call: Call = call_plainly
    encode_captions: EncodeCaptions | None = None
    noise_level: NoiseLevel = in_thousands


_FAMILIES: dict[str, Family] = {}


def register(
    class_name: str,
    describe: Describe,
    call: Call = call_plainly,
    encode_captions: EncodeCaptions | None = None,
    noise_level: NoiseLevel = in_thousands,
) -> None:
    """Let models of a class (and its subclasses) be patched.

    Args:
        class_name: the class's `__name__`.
        describe: takes a model, on any device, and the reference size of its input (None: the model's own), and
            returns its description.
        call: how training calls the model; see `Call`.
        encode_captions: how training makes its condition of text; see `EncodeCaptions`.
        noise_level: of the timestep that the model is told, for methods that go by it.
    """
    _FAMILIES[class_name] = Family(describe, call, encode_captions, noise_level)


def family_of(model_class: type) -> Family:
    """What is registered for a class or the nearest of its parents.

    Raises:
        UserError: nothing is.
    """
    for parent in model_class.__mro__:
        if parent.__name__ in _FAMILIES:
            return _FAMILIES[parent.__name__]
    name = model_class.__name__
    raise UserError(
        f"No description of {name} is known, so its sites cannot be found. Known: {', '.join(sorted(_FAMILIES))}. "
        f"Describe it with stagepatch.families.register('{name}', function), as docs/adding-a-backbone.md shows."
    )


def describe(model: nn.Module, sample_size: Any = None) -> Backbone:
    """The description of a model.

    Args:
        sample_size: size of the model's input [latent pixels] at which grids are counted, by default its own.

    Raises:
        UserError: no family is registered for the model's class or one of its parents.
    """
    return family_of(type(model)).describe(model, sample_size)


DENOISERS = ("transformer", "unet", "transformer_2", "prior", "decoder")


def find_denoiser(target: Any, component: str = "") -> nn.Module:
    """The denoiser of a diffusers pipeline, or the model itself; compiled or not.

    Args:
        component: the denoiser's name in a pipeline that has several.

    Raises:
        UserError: `target` is neither a model nor a pipeline with a denoiser, or one of several has to be named.
    """
    if isinstance(target, nn.Module):
        return uncompiled(target)
    name = type(target).__name__
    found = [part for part in DENOISERS if isinstance(getattr(target, part, None), nn.Module)]
    if component:
        module = getattr(target, component, None)
        if not isinstance(module, nn.Module):
            raise UserError(f"{name} has no model '{component}'. Its denoisers: {', '.join(found) or 'none'}.")
        return uncompiled(module)
    if not found:
        raise UserError(f"{name} is neither a model nor a pipeline with a transformer or unet.")
    if len(found) > 1:
        raise UserError(f"{name} has several denoisers, {', '.join(found)}: say which with component='{found[0]}'.")
    return uncompiled(getattr(target, found[0]))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model
