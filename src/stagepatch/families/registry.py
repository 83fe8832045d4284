"""From a model's class to its description."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Begin, Grid, Reduce, Site, last_token
from stagepatch.families.structure import describe_structure

NUM_TIMESTEPS = 1000.0  # of schedulers

# (model, sample_size) -> description
Describe = Callable[[Any, Any], Backbone]
# (model, sample [B, C, H, W], the model's timesteps [B], condition) -> output [B, C or 2C, H, W]; see `of_videos` too
Call = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
# (pipeline without denoiser and VAE, captions) -> a denoiser's condition, each tensor a row per caption; of a family
# that `reads_image` (…, captions, pictures), with the picture of each, [1, 3, H, W] from −1 to 1
EncodeCaptions = Callable[..., dict[str, Tensor]]
# The same with the pictures that each caption is about, [R, 3, H, W] from −1 to 1
EncodeEdits = Callable[[Any, list[str], list[Tensor]], dict[str, Tensor]]


def call_by_keywords(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """The way most models are called."""
    output: tuple[Tensor, ...] = model(sample, timestep=timesteps, return_dict=False, **condition)
    return output[0]


@dataclass(frozen=True)
class VideoCall:
    """How a model of videos [B, C, F, H, W] is called; with pictures [B, C, H, W] too, as videos of one frame."""

    call: Call

    def __call__(self, model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
        if sample.ndim == 5:
            return self.call(model, sample, timesteps, condition)
        return self.call(model, sample.unsqueeze(2), timesteps, condition).squeeze(2)


def of_videos(call: Call) -> Call:
    """Let a model be trained on videos, by its `call` of them, and on pictures."""
    return VideoCall(call)


# How every pipeline's `encode_prompt` is called, as far as it has these: for captions alone, one row each.
_USUAL = {
    "prompt_2": None,
    "prompt_3": None,
    "num_images_per_prompt": 1,
    "num_videos_per_prompt": 1,
    "do_classifier_free_guidance": False,
}


def prompt_encoder(*names: str, **arguments: Any) -> EncodeCaptions:
    """What encodes captions by the pipeline's own `encode_prompt`.

    Args:
        names: what the model calls each of its results; '' leaves one out.
        arguments: further ones of `encode_prompt`.
    """

    def encode(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        taken = inspect.signature(pipe.encode_prompt).parameters
        usual = {name: value for name, value in _USUAL.items() if name in taken}
        results = pipe.encode_prompt(captions, device=pipe.device, **usual, **arguments)
        return {name: result for name, result in zip(names, results, strict=False) if name}

    return encode


@dataclass(frozen=True)
class Family:
    """What there is to know of a class of models. To patch them, `describe` alone is needed; to train, all.

    Args:
        model_class: its `__name__`.
        describe: takes a model, on any device, and the reference size of its input (None: the model's own), and
            returns its description.
        call: how training calls the model; see `Call`.
        encode_captions: how training makes its condition of text; see `EncodeCaptions`.
        timestep_range: the model's `timestep` for an image and for pure noise.
        sample_size: height and width of a sample [latent pixels], where the model's config has none.
        channels: what the model's config calls the channels of a sample.
        is_packed: cells of 2×2 latent pixels are the model's tokens, with four times the latents' channels.
        caption_parts: of the pipeline, which it cannot do without to encode captions, besides its text encoders.
        is_pixel_by_pixel: the cells' numbers, and the VAE's statistics of them, are in order of pixels and then of
            channels.
        is_scaled_by_statistics: the VAE's `latents_mean` and `latents_std` alone scale its latents, whatever its
            `scaling_factor`.
        timestep_argument: what the model's forward calls its `timestep`.
        logit_normal: mean and spread of the density of noise levels that its makers or diffusers' own script train it
            with, where that is logit-normal; None for another, or uniform.
        embeds_text: the model takes tokens of text, and there is no text encoder beside it.
        takes_references: training can give it the latents of pictures to edit, [B, R, C, H, W], as `reference_latents`
            among its condition.
        has_blank_reference: a blank one comes first, and is there also where images are no edits.
        reads_image: captions are encoded together with the picture that they are of, which training has.
        encode_edits: in place of `encode_captions`, where captions are read together with pictures to edit.
        recomputes: whether diffusers' gradient checkpointing computes what the model does without it.
    """

    model_class: str
    describe: Describe
    call: Call = call_by_keywords
    encode_captions: EncodeCaptions | None = None
    timestep_range: tuple[float, float] = (0.0, NUM_TIMESTEPS)
    sample_size: tuple[int, int] | None = None
    channels: str = "in_channels"
    is_packed: bool = False
    caption_parts: tuple[str, ...] = ()
    is_pixel_by_pixel: bool = False
    is_scaled_by_statistics: bool = False
    timestep_argument: str = "timestep"
    logit_normal: tuple[float, float] | None = None
    recomputes: bool = True
    embeds_text: bool = False
    takes_references: bool = False
    has_blank_reference: bool = False
    reads_image: bool = False
    encode_edits: EncodeEdits | None = None

    def noise_level(self, timestep: Tensor) -> Tensor:
        """0 (an image) to 1 (noise), of the model's `timestep`."""
        start, end = self.timestep_range
        return (timestep - start) / (end - start)

    def sample_levels(self, timestep: Tensor) -> Tensor:
        """The noise level of each sample, [B], of one or more; of one that is told a timestep a token, the highest."""
        level = self.noise_level(timestep)
        return level.flatten(1).amax(dim=1) if level.ndim > 1 else level.reshape(-1)

    def own_timesteps(self, timesteps: Tensor) -> Tensor:
        """The model's `timestep` for timesteps of 0 to 1000, as schedulers have them."""
        start, end = self.timestep_range
        if (start, end) == (0.0, NUM_TIMESTEPS):
            return timesteps
        return start + timesteps / NUM_TIMESTEPS * (end - start)


_FAMILIES: dict[str, Family] = {}


def add_families(families: Iterable[Family]) -> None:
    """Let models of these families be patched."""
    _FAMILIES.update({family.model_class: family for family in families})


def register(class_name: str, describe: Describe, **options: Any) -> None:
    """Let models of a class (and its subclasses) be patched. The arguments are those of `Family`."""
    add_families([Family(class_name, describe, **options)])


def has_family(model_class: type) -> bool:
    """Whether a class or one of its parents is registered."""
    return any(parent.__name__ in _FAMILIES for parent in model_class.__mro__)


def family_of(model_class: type) -> Family:
    """What is registered for a class or the nearest of its parents.

    Raises:
        UserError: nothing is. How a class is called, what its timesteps run from and to, and how captions become its
            condition do not show in its structure, so what needs them (training, experts) is refused.
    """
    for parent in model_class.__mro__:
        if parent.__name__ in _FAMILIES:
            return _FAMILIES[parent.__name__]
    name = model_class.__name__
    raise UserError(
        f"No description of {name} is known: its sites, how it is called, what its timesteps run from and to. Known: "
        f"{', '.join(sorted(_FAMILIES))}. Describe it with stagepatch.families.register('{name}', function), as "
        f"docs/adding-a-family.md shows; where Patch.create(model) finds its sites and it is called as most are, with "
        f"register('{name}', describe_structure)."
    )


def describe(model: nn.Module, sample_size: Any = None) -> Backbone:
    """The description of a model; of a class that is not registered, what its structure shows.

    Args:
        sample_size: size of the model's input [latent pixels] at which grids are counted, by default its own.

    Raises:
        UserError: no family is registered for the model's class or one of its parents, and its structure does not show
            enough.
    """
    if has_family(type(model)) or not hasattr(model, "config"):
        return family_of(type(model)).describe(model, sample_size)
    return describe_structure(model, sample_size)


def make_backbone(
    model: nn.Module,
    sites: Sequence[Site],
    grid: Grid,
    begin: Begin | None,
    time_tap: str,
    condition_taps: Sequence[str] = (),
    optional_taps: Sequence[str] = (),
    reduce: Reduce = last_token,
) -> Backbone:
    """A model's description; its class and the width of its embeddings are read off the model.

    Args:
        optional_taps: condition taps that count where the model has them.
    """
    modules = dict(model.named_modules())
    taps = (*condition_taps, *(path for path in optional_taps if path in modules))
    *_, last = (layer for layer in modules[time_tap].modules() if isinstance(layer, nn.Linear))
    model_class = family_of(type(model)).model_class
    return Backbone(model_class, tuple(sites), time_tap, taps, last.out_features, grid, begin, reduce)


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
    if not component and not found:
        raise UserError(f"{name} is neither a model nor a pipeline with a transformer or unet.")
    if not component and len(found) > 1:
        raise UserError(f"{name} has several denoisers, {', '.join(found)}: say which with component='{found[0]}'.")
    model = getattr(target, component or found[0], None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} has no model '{component}'. Its denoisers: {', '.join(found) or 'none'}.")
    return uncompiled(model)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile(model)` wraps."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model
