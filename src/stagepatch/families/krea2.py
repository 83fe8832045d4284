"""Krea 2: a site before every block, in which the image follows the text."""

from typing import Any

import torch
from torch import Tensor

from stagepatch.families.base import Extent
from stagepatch.families.flux import grid_of, positions
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed
from stagepatch.families.registry import Family
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer


def krea2_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Rows and columns, read off the tokens' positions; those of text are zeros."""
    return Extent(grid_of(arguments["position_ids"]))


def call_krea2(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    ids = positions(sample, condition)
    all_ids = torch.cat([ids["txt_ids"], ids["img_ids"]])
    return call_packed(model, sample, timesteps, {**condition, "position_ids": all_ids})


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Without the fill between caption and template: the model neither sees nor counts it."""
    tokens, mask = pipe.encode_prompt(captions, device=pipe.device)
    return pad_texts([text[is_token] for text, is_token in zip(tokens, mask, strict=True)])


FAMILY = Family(
    "Krea2Transformer2DModel",
    Transformer(
        (Blocks("transformer_blocks", "last"),),
        "time_embed",
        sample_size=SAMPLE_SIZE,
        patch_size=PATCH_SIZE,
        begin=krea2_extent,
    ),
    call_krea2,
    encode_captions,
    timestep_range=(0.0, 1.0),
    sample_size=SAMPLE_SIZE,
    is_packed=True,
)
