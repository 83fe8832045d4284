"""Models by the names people know, built from their public configs without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from stagepatch.core import UserError
from stagepatch.models import DIT_SIZES, DiT


@dataclass(frozen=True)
class Named:
    """A model's class and config, as its authors published them.

    Args:
        model_class: of diffusers.
        config: what differs from the class's defaults.
        grid: prompts along each dimension that keep a patch small.
    """

    model_class: str
    config: dict[str, Any]
    grid: tuple[int, ...] = (16, 16)


NAMED_MODELS = {
    "SD-1.5": Named("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "SDXL": Named(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "SD3-medium": Named(
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "FLUX.1-dev": Named("FluxTransformer2DModel", {"guidance_embeds": True}),
    "PixArt-Sigma": Named("PixArtTransformer2DModel", {"caption_channels": 4096, "use_additional_conditions": False}),
    "Wan2.1-1.3B": Named(
        "WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, grid=(4, 8, 8)
    ),
}


def build_named(name: str) -> nn.Module:
    """A DiT size or one of NAMED_MODELS, on the meta device.

    Raises:
        UserError: an unknown name.
    """
    if name not in NAMED_MODELS and name not in DIT_SIZES:
        raise UserError(f"No model '{name}' is known by name. Known: {', '.join([*DIT_SIZES, *NAMED_MODELS])}.")
    with torch.device("meta"):
        if name in DIT_SIZES:
            return DiT.from_name(name)  # type: ignore[no-any-return]
        model = NAMED_MODELS[name]
        return getattr(diffusers, model.model_class)(**model.config)  # type: ignore[no-any-return]
