"""Qwen-Image: a site before every block; only the tokens of the image that is made are prompted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stagepatch.core.errors import UserError
from stagepatch.families.base import Backbone, Extent, block_sites, patches, reference_size, width
from stagepatch.families.packing import pack, unpack

_PACKING = (2, 2)  # latent pixels that the pipeline packs into a token


def describe_qwenimage(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. The sample size is that of the latents before packing; 128 is an image of 1024×1024.

    Raises:
        UserError: a model whose forward embeds two timesteps, as some that edit images do.
    """
    config = model.config
    if getattr(config, "zero_cond_t", False):
        raise UserError("QwenImageTransformer2DModel with zero_cond_t embeds two timesteps: it cannot be patched yet.")
    grid = patches(reference_size(sample_size, (128, 128)), _PACKING)
    channels = width(config)
    return Backbone(
        model_class="QwenImageTransformer2DModel",
        sites=block_sites("transformer_blocks", len(model.transformer_blocks), channels, grid),
        time_tap="time_text_embed.timestep_embedder",
        condition_taps=(),
        condition_channels=channels,
        grid=grid,
        begin=_begin,
    )


def _begin(model: Any, arguments: dict[str, Any]) -> Extent:
    # Shapes (frames, height, width) of each sample's images, the one that is made first; in older pipelines,
    # of one sample for all.
    shape = arguments["img_shapes"][0]
    frames, height, width = shape[0] if isinstance(shape, list) else shape
    return Extent((frames * height, width))


def call_qwenimage(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    batch, _, height, width = sample.shape
    output: tuple[Tensor, ...] = model(
        pack(sample),
        timestep=timesteps / 1000.0,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
        **condition,
    )
    return unpack(output[0], height, width)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, mask = pipe.encode_prompt(captions, pipe.device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}
