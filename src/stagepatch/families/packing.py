"""Latents as the tokens of a model that takes 2×2 of them at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.families.registry import call_by_keywords

# Latent pixels in a token, and in the images of 1024×1024 that these models are made for.
PATCH_SIZE, SAMPLE_SIZE = (2, 2), (128, 128)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 · W/2, 4C]"""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H/2 · W/2, 4C] -> [B, C, H, W]"""
    cells = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def call_cells(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Of a model that takes and gives maps of cells, [B, 4C, H/2, W/2]."""
    return F.pixel_shuffle(call_by_keywords(model, F.pixel_unshuffle(sample, 2), timesteps, condition), 2)


def call_packed(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Any]) -> Tensor:
    """See `Call`. Of a model that takes and gives tokens; those of pictures to edit, `reference_latents` of the
    condition, come behind those of the sample."""
    references, condition = split_references(condition)
    tokens = pack(sample)
    given = torch.cat([tokens, *(pack(each) for each in references)], dim=1)
    output = call_by_keywords(model, given, timesteps, condition)
    return unpack(output[:, : tokens.shape[1]], *sample.shape[2:])


def split_references(condition: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Latents of pictures to edit, [B, C, H, W] each, and what else a condition has."""
    others = {name: value for name, value in condition.items() if name != "reference_latents"}
    given = condition.get("reference_latents")
    return [] if given is None else list(given.unbind(dim=1)), others
