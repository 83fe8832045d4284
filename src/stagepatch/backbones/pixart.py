"""PixArt-α and PixArt-Σ: a site before every block."""

from __future__ import annotations

from typing import Any

from stagepatch.backbones.base import Backbone, block_sites, cut_image, separate_attention, width


def describe_pixart(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Text enters by cross-attention alone, so t+c is not defined."""
    grid, begin = cut_image(model.config, sample_size)
    channels = width(model.config)
    blocks = model.transformer_blocks
    return Backbone(
        model_class="PixArtTransformer2DModel",
        sites=block_sites(
            "transformer_blocks",
            len(blocks),
            channels,
            grid,
            attention=lambda block: separate_attention(blocks[0].attn1, f"{block}.attn1"),
        ),
        time_tap="adaln_single.emb.timestep_embedder",
        condition_taps=(),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )
