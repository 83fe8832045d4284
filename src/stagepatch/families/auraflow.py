"""AuraFlow: a site before every joint and every single block; only the image's tokens are prompted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Backbone, block_sites, cut_image, width
from stagepatch.families.registry import call_plainly


def describe_auraflow(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. In the single blocks the image follows the text and the register tokens."""
    grid, begin = cut_image(model.config, sample_size)
    channels = width(model.config)
    joint, single = len(model.joint_transformer_blocks), len(model.single_transformer_blocks)
    return Backbone(
        model_class="AuraFlowTransformer2DModel",
        sites=(
            *block_sites("joint_transformer_blocks", joint, channels, grid),
            *block_sites("single_transformer_blocks", single, channels, grid, joint, image_tokens="last"),
        ),
        time_tap="time_step_proj",
        condition_taps=(),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )


def call_auraflow(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    return call_plainly(model, sample, timesteps / 1000.0, condition)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Padding is zeroed rather than masked."""
    embeds, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, device=pipe.device)
    return {"encoder_hidden_states": embeds}
