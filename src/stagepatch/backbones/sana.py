"""Sana: a site before every block."""

from __future__ import annotations

from typing import Any

from stagepatch.backbones.base import Backbone, block_sites, cut_image, width


def describe_sana(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Text enters by cross-attention alone, so t+c adds guidance where the model embeds it."""
    grid, begin = cut_image(model.config, sample_size)
    channels = width(model.config)
    guided = hasattr(model.time_embed, "guidance_embedder")
    return Backbone(
        model_class="SanaTransformer2DModel",
        sites=block_sites("transformer_blocks", len(model.transformer_blocks), channels, grid),
        time_tap="time_embed.timestep_embedder" if guided else "time_embed.emb.timestep_embedder",
        condition_taps=("time_embed.guidance_embedder",) if guided else (),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )
