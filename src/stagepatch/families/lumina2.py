"""Lumina-Image 2.0: a site before every refiner of the image and every joint block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, Extent, block_sites, cut_image
from stagepatch.families.registry import call_plainly


def describe_lumina2(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. In the joint blocks each sample's image follows its own text, however long."""
    config = model.config
    grid, begin_with_image = cut_image(config, sample_size)
    channels, refiners = config.hidden_size, len(model.noise_refiner)

    def begin(model: Any, arguments: dict[str, Any]) -> Extent:
        text_lengths = arguments["encoder_attention_mask"].sum(dim=1).long()
        return replace(begin_with_image(model, arguments), text_lengths=text_lengths)

    return Backbone(
        model_class="Lumina2Transformer2DModel",
        sites=(
            *block_sites("noise_refiner", refiners, channels, grid),
            *block_sites("layers", len(model.layers), channels, grid, refiners, image_tokens="after_text"),
        ),
        time_tap="time_caption_embed.timestep_embedder",
        condition_taps=(),
        condition_channels=model.time_caption_embed.timestep_embedder.linear_2.out_features,
        grid=grid,
        begin=begin,
    )


def call_lumina2(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The model counts time from noise to image, and predicts x_start − noise."""
    return -call_plainly(model, sample, 1.0 - timesteps / 1000.0, condition)


def noise_level(timestep: Tensor) -> Tensor:
    """Time runs from noise to image here."""
    return 1.0 - timestep


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.device)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
