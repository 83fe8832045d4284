"""FLUX.1: a site before every double and every single block; only the image's tokens are prompted."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stagepatch.families.base import Extent, Grid
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed
from stagepatch.families.registry import Family, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer


def flux_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Rows and columns, read off the tokens' positions."""
    return Extent(grid_of_positions(arguments["img_ids"]))


# A pipeline gives the same tensor at every step, so that an accelerator is waited for but once.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=1)
def grid_of_positions(ids: Tensor) -> Grid:
    """Of the image that is made, from positions [N, 3]; tokens of images to edit have another first number."""
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0]
    return tuple(int(last) + 1 for last in own[:, 1:3].amax(dim=0).tolist())


def image_positions(sample: Tensor) -> Tensor:
    """Zero, row and column of each token [N, 3], of latents [B, C, H, W] in cells of 2×2."""
    height, width = (length // 2 for length in sample.shape[2:])
    ids = sample.new_zeros(height, width, 3)
    ids[..., 1] += torch.arange(height, device=sample.device)[:, None]
    ids[..., 2] += torch.arange(width, device=sample.device)
    return ids.flatten(0, 1)


def call_flux(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. A model that was distilled under guidance is told a scale of 1, which is none."""
    added = {
        "img_ids": image_positions(sample),
        "txt_ids": sample.new_zeros(condition["encoder_hidden_states"].shape[1], 3),
        "guidance": sample.new_ones(len(sample)) if model.config.guidance_embeds else None,
    }
    return call_packed(model, sample, timesteps, {**condition, **added})


FAMILY = Family(
    "FluxTransformer2DModel",
    Transformer(
        (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
        "time_text_embed.timestep_embedder",
        ("time_text_embed.text_embedder",),
        optional_taps=("time_text_embed.guidance_embedder",),
        sample_size=SAMPLE_SIZE,
        patch_size=PATCH_SIZE,
        begin=flux_extent,
    ),
    call_flux,
    prompt_encoder("encoder_hidden_states", "pooled_projections"),
    timestep_range=(0.0, 1.0),
    sample_size=SAMPLE_SIZE,
    is_packed=True,
)
