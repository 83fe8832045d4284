"""PixArt-α and PixArt-Σ: a site before every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, block_sites, cut_image, separate_attention, width


def describe_pixart(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. Text enters by cross-attention alone, so t+c is t."""
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


def call_pixart(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """Models that embed resolution and aspect ratio are told the sample's own, as an image of eight times its size."""
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.config.use_additional_conditions or (
        model.config.use_additional_conditions is None and model.config.sample_size == 128
    ):
        height, width = (8.0 * length for length in sample.shape[2:])
        added = {
            "resolution": sample.new_tensor([height, width]).repeat(len(sample), 1),
            "aspect_ratio": sample.new_tensor([height / width]).repeat(len(sample), 1),
        }
    output: tuple[Tensor, ...] = model(
        sample, timestep=timesteps, added_cond_kwargs=added, return_dict=False, **condition
    )
    return output[0]


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.device)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
