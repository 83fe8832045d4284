"""Sana: a site before every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, block_sites, cut_image, width
from stagepatch.families.registry import call_plainly


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


def call_sana(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    return call_plainly(model, sample, timesteps * model.config.timestep_scale, condition)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Without the instruction that the pipeline puts before short prompts."""
    embeds, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.device)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
