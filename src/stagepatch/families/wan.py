"""Wan 2.1 (video): a site before every block, tokens of frames × height × width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, Extent, block_sites, patches, reference_size, width
from stagepatch.families.registry import call_plainly

_SAMPLE_SIZE = (21, 60, 104)  # latents of 81 frames of 480×832


def describe_wan(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Text enters by cross-attention alone, so t+c is t."""
    config = model.config
    patch_size = tuple(config.patch_size)

    def begin(model: Any, arguments: dict[str, Any]) -> Extent:
        return Extent(patches(arguments["hidden_states"].shape[2:], patch_size))

    grid = patches(reference_size(sample_size, _SAMPLE_SIZE), patch_size)
    channels = width(config)
    return Backbone(
        model_class="WanTransformer3DModel",
        sites=block_sites("blocks", len(model.blocks), channels, grid),
        time_tap="condition_embedder.time_embedder",
        condition_taps=(),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )


def call_wan(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. A picture [B, C, H, W] is a video of one frame."""
    if sample.ndim == 5:
        return call_plainly(model, sample, timesteps, condition)
    return call_plainly(model, sample.unsqueeze(2), timesteps, condition).squeeze(2)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. As many tokens as the pipeline's call makes; its encode_prompt alone would make fewer."""
    embeds, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=512, device=pipe.device
    )
    return {"encoder_hidden_states": embeds}
