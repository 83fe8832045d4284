"""CogVideoX: a site before every block; text and video are two streams."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Extent, patches
from stagepatch.families.registry import Family, call_by_keywords, of_videos, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer, own_patch_size


def cogvideox_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """The model takes videos with frames before channels, [B, F, C, H, W]."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return Extent(patches((frames, height, width), own_patch_size(model, 3)))


_DESCRIBE = Transformer((Blocks("transformer_blocks"),), "time_embedding", begin=cogvideox_extent)


def describe_cogvideox(model: Any, sample_size: Any = None) -> Backbone:
    """The sample size is the config's; where tokens span several frames (CogVideoX 1.5), it is of whole ones."""
    config, span = model.config, model.config.patch_size_t or 1
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    own = (-(-frames // span) * span, config.sample_height, config.sample_width)
    return replace(_DESCRIBE, sample_size=own)(model, sample_size)


@of_videos
def call_cogvideox(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Positions are those of the pipeline.

    Raises:
        UserError: frames that do not fill the model's tokens.
    """
    from diffusers import CogVideoXPipeline

    frames, height, width = sample.shape[2:]
    if frames % (span := model.config.patch_size_t or 1):
        raise UserError(f"This CogVideoX takes {span} frames of latents as one token, so {frames} cannot train it.")
    positions = None
    if model.config.use_rotary_positional_embeddings:
        pipe: Any = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
        prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
        positions = prepare(pipe, height, width, frames, sample.device)
    added = {"image_rotary_emb": positions}
    return call_by_keywords(model, sample.transpose(1, 2), timesteps, {**condition, **added}).transpose(1, 2)


FAMILY = Family(
    "CogVideoXTransformer3DModel",
    describe_cogvideox,
    call_cogvideox,
    prompt_encoder("encoder_hidden_states"),
    sample_size=(60, 90),
)
