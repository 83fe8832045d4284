"""Ideogram 4: a site before every block, in which the image follows the text. Its unconditional model is left."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.families.base import Extent, Grid
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE
from stagepatch.families.registry import Family, call_by_keywords
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer

# What the model calls its tokens; where the image's positions begin. As in diffusers.
TEXT, IMAGE, NO_SEGMENT, IMAGE_OFFSET = 3, 2, -1, 65536


def ideogram4_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Rows and columns, read off the last token's position."""
    return Extent(_grid(arguments["position_ids"]))


# A pipeline gives the same tensor at every step, so that an accelerator is waited for but once.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=1)
def _grid(ids: Tensor) -> Grid:
    return tuple((ids[0, -1, 1:] - IMAGE_OFFSET + 1).tolist())


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 · W/2, 4C], a cell's pixels one after the other."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H/2 · W/2, 4C] -> [B, C, H, W]"""
    cells = tokens.view(len(tokens), height // 2, width // 2, 2, 2, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)


def call_ideogram4(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The model predicts x_start − noise. Text, its fill, which attends to itself alone, and image."""
    text, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"].bool()
    height, width = sample.shape[2:]
    (batch, length), count = mask.shape, height // 2 * (width // 2)
    places = torch.arange(length, device=sample.device)[:, None].expand(batch, length, 3)
    rows, columns = (torch.arange(side // 2, device=sample.device) for side in (height, width))
    image_places = torch.cartesian_prod(rows.new_zeros(1), rows, columns) + IMAGE_OFFSET
    roles = torch.where(mask, TEXT, 0)
    segments = torch.where(mask, 1, NO_SEGMENT)
    added = {
        "encoder_hidden_states": F.pad(text, (0, 0, 0, count)),
        "position_ids": torch.cat([places * mask[..., None], image_places.expand(batch, -1, -1)], dim=1),
        "segment_ids": F.pad(segments, (0, count), value=1),
        "indicator": F.pad(roles, (0, count), value=IMAGE),
    }
    output = call_by_keywords(model, F.pad(pack(sample), (0, 0, length, 0)), timesteps, added)
    return -unpack(output[:, length:], height, width)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. One by one: the pipeline fills each up to 2048 tokens of the states of 13 layers."""
    texts = []
    for caption in captions:
        tokens, _, _, roles = pipe.encode_prompt(caption, 0, 0, max_sequence_length=2048, device=pipe.device)
        texts.append(tokens[roles == TEXT])
    return pad_texts(texts)


FAMILY = Family(
    "Ideogram4Transformer2DModel",
    Transformer(
        (Blocks("layers", "last"),),
        "t_embedding",
        sample_size=SAMPLE_SIZE,
        patch_size=PATCH_SIZE,
        begin=ideogram4_extent,
    ),
    call_ideogram4,
    encode_captions,
    timestep_range=(1.0, 0.0),
    logit_normal=(0.0, 1.5),
    sample_size=SAMPLE_SIZE,
    is_packed=True,
    is_pixel_by_pixel=True,
)
