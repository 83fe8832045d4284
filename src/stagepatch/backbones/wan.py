"""Wan 2.1 (video): a site before every block, tokens of frames × height × width."""

from __future__ import annotations

from typing import Any

from stagepatch.backbones.base import Backbone, Extent, block_sites, patches, reference_size, width

_SAMPLE_SIZE = (21, 60, 104)  # latents of 81 frames of 480×832


def describe_wan(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Text enters by cross-attention alone, so t+c is not defined."""
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
