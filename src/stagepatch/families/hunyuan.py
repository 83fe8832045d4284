"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1: image and text are two streams in every block.

Their timesteps are of the sample's type, which is that of their embedding.
"""

from typing import Any

import torch
from torch import Tensor

from stagepatch.families.registry import EncodeCaptions, Family, call_by_keywords, of_videos, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer


def _guidance(model: Any, sample: Tensor) -> dict[str, Tensor | None]:
    """A model that was distilled under guidance is told a scale of 1, which is none; as in the pipeline times 1000."""
    return {"guidance": sample.new_full((len(sample),), 1000.0) if model.config.guidance_embeds else None}


@of_videos
def call_hunyuanvideo(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`."""
    return call_by_keywords(model, sample, timesteps.to(sample.dtype), {**condition, **_guidance(model, sample)})


@of_videos
def call_hunyuanvideo15(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Without a first frame: latents of it, their mask and its embedding are zero, and not attended to."""
    given = torch.zeros_like(sample)
    added = {"image_embeds": sample.new_zeros(len(sample), 1, model.config.image_embed_dim)}
    whole = torch.cat([sample, given, given[:, :1]], dim=1)
    return call_by_keywords(model, whole, timesteps.to(sample.dtype), {**condition, **added})


def call_hunyuanimage(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. A mean flow over no time, from `timestep` to `timestep_r`, is the velocity (arXiv 2505.13447)."""
    timesteps = timesteps.to(sample.dtype)
    added = {**_guidance(model, sample), "timestep_r": timesteps if model.config.use_meanflow else None}
    return call_by_keywords(model, sample, timesteps, {**condition, **added})


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. The second text is what a caption puts in quotes, by ByT5."""
    encode: EncodeCaptions = prompt_encoder(
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        batch_size=len(captions),
    )
    return encode(pipe, captions)


FAMILIES = [
    # The sample size is that of 129 frames of 720×1280.
    Family(
        "HunyuanVideoTransformer3DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_text_embed.timestep_embedder",
            ("time_text_embed.text_embedder",),
            optional_taps=("time_text_embed.guidance_embedder",),
            sample_size=(33, 90, 160),
        ),
        call_hunyuanvideo,
        prompt_encoder("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
        sample_size=(90, 160),
    ),
    # The sample size is that of 121 frames of 480×848. A sample has half of the channels that the model takes.
    Family(
        "HunyuanVideo15Transformer3DModel",
        Transformer((Blocks("transformer_blocks"),), "time_embed.timestep_embedder", sample_size=(31, 30, 53)),
        call_hunyuanvideo15,
        encode_captions,
        sample_size=(30, 53),
        channels="out_channels",
        caption_parts=("vae",),  # the pipeline's class cannot be made without
    ),
    # The sample size is that of 2048×2048.
    Family(
        "HunyuanImageTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_guidance_embed.timestep_embedder",
            optional_taps=("time_guidance_embed.guidance_embedder",),
            sample_size=(64, 64),
        ),
        call_hunyuanimage,
        encode_captions,
        recomputes=False,  # diffusers 0.42 fails there
        sample_size=(64, 64),
    ),
]
