"""diffusers' U-Nets, UNet2DModel and UNet2DConditionModel: a site at every stage, and at every attention."""

from typing import Any

from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Extent, Grid, Site, reference_size, self_attention
from stagepatch.families.calling import takes_image_embeds
from stagepatch.families.registry import Family, call_by_keywords, make_backbone, prompt_encoder

_SAMPLE_SIZE = (64, 64)  # of Stable Diffusion 1.x, where a config has none


def describe_unet(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`.

    Sites of kind 'stage' are the inputs of the down blocks, the mid block and the up blocks; sites of kind
    'attention' are the inputs of their attentions (where text is attended to, of their transformers). The gate's
    reference grid is the sample's.
    """
    size = reference_size(sample_size, model.config.sample_size or _SAMPLE_SIZE)
    stages = _stages(model, size)
    attentions = [
        (f"{path}.attentions.{number}", module, grid)
        for path, _, grid in stages
        for number, module in enumerate(getattr(model.get_submodule(path), "attentions", None) or ())
        if module is not None
    ]
    sites = [Site(path, path, i, width, grid, "map", kind="stage") for i, (path, width, grid) in enumerate(stages)]
    sites += [_attention_site(path, i, module, grid) for i, (path, module, grid) in enumerate(attentions)]
    return make_backbone(
        model, sites, size, _begin, "time_embedding", optional_taps=("class_embedding", "add_embedding")
    )


def _begin(model: Any, arguments: dict[str, Any]) -> Extent:
    return Extent(tuple(arguments["sample"].shape[2:]))


def _stages(model: Any, size: Grid) -> list[tuple[str, int, Grid]]:
    """Path, channels and grid of each stage's input, on the way down, in the middle, and up again."""
    widths = list(model.config.block_out_channels)
    inputs = [(f"down_blocks.{number}", width) for number, width in enumerate([widths[0], *widths[:-1]])]
    inputs += [("mid_block", widths[-1])] if model.mid_block is not None else []
    inputs += [(f"up_blocks.{number}", width) for number, width in enumerate([widths[-1], *widths[:0:-1]])]
    stages, halvings = [], 0
    for path, channels in inputs:
        stages.append((path, channels, tuple(-(-length // 2**halvings) for length in size)))
        block = model.get_submodule(path)
        halvings += _has(block, "downsamplers", "resnet_down") - _has(block, "upsamplers", "resnet_up")
    return stages


def _has(block: Any, *names: str) -> bool:
    return any(getattr(block, name, None) is not None for name in names)


def _attention_site(path: str, index: int, module: Any, grid: Grid) -> Site:
    """Prompts can be prepended where it attends to the image alone; of a transformer, in its first block."""
    has_blocks = hasattr(module, "transformer_blocks")
    channels = module.in_channels if has_blocks else module.query_dim
    name = "transformer_blocks.0.attn1" if has_blocks else ""
    own = module.transformer_blocks[0].attn1 if has_blocks else module
    is_self = own is not None and not own.is_cross_attention and own.added_kv_proj_dim is None
    attention = self_attention(module, name, path) if is_self else None
    return Site(path, path, index, channels, grid, "map", kind="attention", attention=attention)


def call_unet(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. SDXL is told the sample's own size, uncropped, as an image of eight times its size. Kandinsky 2.2
    takes `image_embeds` [B, C] for a condition.

    Raises:
        UserError: a model whose timestep is a noise level σ of a variance-exploding process, or one that lacks its
            `image_embeds`.
    """
    arguments: dict[str, Any] = dict(condition)
    name = type(model).__name__
    if model.config.get("time_embedding_type") == "fourier":
        raise UserError(
            f"This {name} embeds its timestep by Fourier features (time_embedding_type='fourier'): it is told a noise "
            f"level, not a timestep of 0 to 1000. It can be patched in Python, but not trained or sampled here."
        )
    if takes_image_embeds(model):
        if "image_embeds" not in arguments:
            raise UserError(
                f"This {name} takes image_embeds, which a prior makes of captions: here they are made of pictures, in "
                f"training, and of captions by the whole pipeline (stagepatch sample)."
            )
        arguments = {"encoder_hidden_states": None, "added_cond_kwargs": arguments}
    if "text_embeds" in arguments:
        size = [8.0 * length for length in sample.shape[2:]]
        time_ids = sample.new_tensor([*size, 0.0, 0.0, *size]).repeat(len(sample), 1)
        arguments["added_cond_kwargs"] = {"text_embeds": arguments.pop("text_embeds"), "time_ids": time_ids}
    return call_by_keywords(model, sample, timesteps, arguments)


_ONE_ENCODER = prompt_encoder("encoder_hidden_states")
_TWO_ENCODERS = prompt_encoder("encoder_hidden_states", "", "text_embeds")


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. SDXL has a second text encoder, and a pooled embedding."""
    return (_TWO_ENCODERS if hasattr(pipe, "text_encoder_2") else _ONE_ENCODER)(pipe, captions)


FAMILIES = [
    Family("UNet2DModel", describe_unet, call_unet, sample_size=_SAMPLE_SIZE),
    Family("UNet2DConditionModel", describe_unet, call_unet, encode_captions, sample_size=_SAMPLE_SIZE),
]
