"""Stable Diffusion 3 and 3.5: a site before every block; only the image's stream is prompted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, block_sites, cut_image, separate_attention, width


def describe_sd3(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Prepended prompts are attended to by the image's tokens, not by the text's."""
    grid, begin = cut_image(model.config, sample_size)
    channels = width(model.config)
    blocks = model.transformer_blocks
    return Backbone(
        model_class="SD3Transformer2DModel",
        sites=block_sites(
            "transformer_blocks",
            len(blocks),
            channels,
            grid,
            attention=lambda block: separate_attention(blocks[0].attn, f"{block}.attn"),
        ),
        time_tap="time_text_embed.timestep_embedder",
        condition_taps=("time_text_embed.text_embedder",),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, _, pooled, _ = pipe.encode_prompt(captions, None, None, pipe.device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
