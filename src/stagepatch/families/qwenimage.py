"""Qwen-Image: a site before every block; only the tokens of the image that is made are prompted."""

from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Extent
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed
from stagepatch.families.registry import Family
from stagepatch.families.transformer import Blocks, Transformer


def qwenimage_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Read off the shapes (frames, height, width) of each sample's images, the one that is made first; older pipelines
    give those of one sample for all."""
    shape = arguments["img_shapes"][0]
    frames, height, width = shape[0] if isinstance(shape, list) else shape
    return Extent((frames * height, width))


_DESCRIBE = Transformer(
    (Blocks("transformer_blocks"),),
    "time_text_embed.timestep_embedder",
    sample_size=SAMPLE_SIZE,
    patch_size=PATCH_SIZE,
    begin=qwenimage_extent,
)


def describe_qwenimage(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`.

    Raises:
        UserError: a model whose forward embeds two timesteps, as some that edit images do.
    """
    if getattr(model.config, "zero_cond_t", False):
        raise UserError("QwenImageTransformer2DModel with zero_cond_t embeds two timesteps: it cannot be patched yet.")
    return _DESCRIBE(model, sample_size)


def call_qwenimage(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    batch, _, height, width = sample.shape
    shapes = [[(1, height // 2, width // 2)]] * batch
    return call_packed(model, sample, timesteps, {**condition, "img_shapes": shapes})


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, mask = pipe.encode_prompt(captions, pipe.device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


FAMILY = Family(
    "QwenImageTransformer2DModel",
    describe_qwenimage,
    call_qwenimage,
    encode_captions,
    timestep_range=(0.0, 1.0),
    sample_size=SAMPLE_SIZE,
    is_packed=True,
)
