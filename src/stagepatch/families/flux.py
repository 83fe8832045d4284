"""FLUX.1: a site before every double and every single block; only the image's tokens are prompted."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from stagepatch.families.base import Backbone, Extent, Grid, block_sites, patches, reference_size, width
from stagepatch.families.packing import pack, unpack

_PACKING = (2, 2)  # latent pixels that the pipeline packs into a token


def describe_flux(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. The sample size is that of the latents before packing; 128 is an image of 1024×1024."""
    grid = patches(reference_size(sample_size, (128, 128)), _PACKING)
    channels = width(model.config)
    double, single = len(model.transformer_blocks), len(model.single_transformer_blocks)
    conditions = ("text_embedder", "guidance_embedder")
    return Backbone(
        model_class="FluxTransformer2DModel",
        sites=(
            *block_sites("transformer_blocks", double, channels, grid),
            *block_sites("single_transformer_blocks", single, channels, grid, double),
        ),
        time_tap="time_text_embed.timestep_embedder",
        condition_taps=tuple(f"time_text_embed.{name}" for name in conditions if hasattr(model.time_text_embed, name)),
        condition_channels=channels,
        grid=grid,
        begin=_Begin(),
    )


class _Begin:
    """Reads rows and columns off the tokens' positions. A pipeline gives the same tensor at every step, so that an
    accelerator is waited for but once."""

    def __init__(self) -> None:
        self.ids: Any = lambda: None
        self.grid: Grid = ()

    def __call__(self, model: Any, arguments: dict[str, Any]) -> Extent:
        ids = arguments["img_ids"]
        if self.ids() is not ids:
            self.grid = _grid(ids)
            self.ids = weakref.ref(ids)
        return Extent(self.grid)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grid(ids: Tensor) -> Grid:
    """Of the image that is made, from positions [N, 3]; tokens of images to edit have another first number."""
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0]
    return tuple(int(last) + 1 for last in own[:, 1:3].amax(dim=0).tolist())


def call_flux(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. A model that was distilled under guidance is told a scale of 1, which is none."""
    batch, _, height, width = sample.shape
    ids = sample.new_zeros(height // 2, width // 2, 3)
    ids[..., 1] += torch.arange(height // 2, device=sample.device)[:, None]
    ids[..., 2] += torch.arange(width // 2, device=sample.device)
    text_ids = sample.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    guidance = sample.new_ones(batch) if model.config.guidance_embeds else None
    output: tuple[Tensor, ...] = model(
        pack(sample),
        timestep=timesteps / 1000.0,
        img_ids=ids.flatten(0, 1),
        txt_ids=text_ids,
        guidance=guidance,
        return_dict=False,
        **condition,
    )
    return unpack(output[0], height, width)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    embeds, pooled, _ = pipe.encode_prompt(captions, None, pipe.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
