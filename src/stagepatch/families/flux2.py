"""FLUX.2, dev and klein: a site before every double and every single block; only the image's tokens are prompted."""

from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Extent
from stagepatch.families.flux import joint_extent
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed, split_references
from stagepatch.families.registry import Family, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer


def flux2_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """See `joint_extent`.

    Raises:
        UserError: a call that puts images to edit before the image that is made.
    """
    if arguments.get("kv_cache_mode") == "extract":
        raise UserError(
            "Flux2KleinKVPipeline puts images to edit before the image that is made, and so it cannot be patched yet: "
            "give it no images to edit, or take Flux2KleinPipeline."
        )
    return joint_extent(model, arguments)


def call_flux2(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Positions are image, row, column and place in the text; pictures to edit are the images 10, 20, ….
    A model that was distilled under guidance is told a scale of 1, which is none."""
    batch, _, height, width = sample.shape
    place = torch.arange(condition["encoder_hidden_states"].shape[1], device=sample.device)
    rows, columns = (torch.arange(length // 2, device=sample.device) for length in (height, width))
    none = rows.new_zeros(1)
    images = 10 * torch.arange(1 + len(split_references(condition)[0]), device=sample.device)
    added = {
        "img_ids": torch.cartesian_prod(images, rows, columns, none),
        "txt_ids": torch.cartesian_prod(none, none, none, place),
        "guidance": sample.new_ones(batch) if model.config.guidance_embeds else None,
    }
    return call_packed(model, sample, timesteps, {**condition, **added})


FAMILY = Family(
    "Flux2Transformer2DModel",
    Transformer(
        (Blocks("transformer_blocks"), Blocks("single_transformer_blocks", "after_text")),
        "time_guidance_embed.timestep_embedder",
        optional_taps=("time_guidance_embed.guidance_embedder",),
        sample_size=SAMPLE_SIZE,
        patch_size=PATCH_SIZE,
        begin=flux2_extent,
    ),
    call_flux2,
    prompt_encoder("encoder_hidden_states"),
    timestep_range=(0.0, 1.0),
    sample_size=SAMPLE_SIZE,
    is_packed=True,
    takes_references=True,
)
