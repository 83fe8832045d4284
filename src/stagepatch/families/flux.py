"""FLUX.1 and models built like it: a site before every double and every single block, of the image's tokens alone."""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.core import UserError
from stagepatch.families.base import Extent, Grid
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed, split_references
from stagepatch.families.registry import Family, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer


def flux_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Rows and columns, read off the tokens' positions."""
    return Extent(grid_of(arguments["img_ids"]))


def joint_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Of a model whose single blocks take the text first, then the image that is made, then images to edit."""
    text = arguments["encoder_hidden_states"]
    lengths = torch.full((len(text),), text.shape[1], device=text.device)
    return Extent(grid_of(arguments["img_ids"]), lengths)


# A pipeline gives the same tensor at every step, so that an accelerator is waited for but once.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=1)
def grid_of(ids: Tensor) -> Grid:
    """Of the image that is made, from positions [N, 3 or 4]; tokens of images to edit have another first number."""
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == ids[0, 0], 1:3].int()
    return tuple((own.amax(dim=0) - own.amin(dim=0) + 1).tolist())


def positions(sample: Tensor, condition: dict[str, Tensor], cell: int = 2) -> dict[str, Tensor]:
    """Of the cells of a sample [B, C, H, W]: nought, row and column, [N, 3]; noughts for the text's tokens."""
    height, width = (length // cell for length in sample.shape[2:])
    ids = sample.new_zeros(height, width, 3)
    ids[..., 1] += torch.arange(height, device=sample.device)[:, None]
    ids[..., 2] += torch.arange(width, device=sample.device)
    return {"img_ids": ids.flatten(0, 1), "txt_ids": sample.new_zeros(condition["encoder_hidden_states"].shape[1], 3)}


def call_flux(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. A model that was distilled under guidance is told a scale of 1, which is none. A picture to edit,
    which Kontext takes, is the image of number 1.

    Raises:
        UserError: several pictures.
    """
    guidance = sample.new_ones(len(sample)) if model.config.guidance_embeds else None
    ids = positions(sample, condition)
    if count := len(split_references(condition)[0]):
        if count > 1:
            raise UserError(f"FLUX.1 Kontext edits one picture, not {count}: leave out NAME-source2.png and further.")
        own = ids["img_ids"]
        ids["img_ids"] = torch.cat([own, own + own.new_tensor([1, 0, 0])])
    added = {**ids, "guidance": guidance}
    return call_packed(model, sample, timesteps, {**condition, **added})


def call_chroma(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The mask of the text goes on over the image, in the sample's dtype: its numbers are added to the
    attention's logits, as in the pipeline."""
    mask = condition["attention_mask"].to(sample.dtype)
    cells = sample.shape[2] // 2 * (sample.shape[3] // 2)
    added = {**positions(sample, condition), "attention_mask": F.pad(mask, (0, cells), value=1.0)}
    return call_packed(model, sample, timesteps, {**condition, **added})


def call_bria(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    return call_packed(model, sample, timesteps, {**condition, **positions(sample, condition)})


_ENCODE_FOR_BRIA = prompt_encoder("encoder_hidden_states")


def encode_for_bria(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. The pipeline asks its denoiser for the dtype."""
    if pipe.transformer is None:
        pipe.transformer = SimpleNamespace(dtype=pipe.text_encoder.dtype)
    return _ENCODE_FOR_BRIA(pipe, captions)


def call_ovis(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Tokens of text lie on the diagonal."""
    return call_packed(model, sample, timesteps, {**condition, **_on_diagonal(sample, condition)})


def call_longcat(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Tokens of text lie on the diagonal, and the image, the first of images, goes on from its end."""
    ids = _on_diagonal(sample, condition)
    start = len(ids["txt_ids"])
    ids["img_ids"] = ids["img_ids"] + ids["img_ids"].new_tensor([1, start, start])
    return call_packed(model, sample, timesteps, {**condition, **ids})


def encode_for_longcat(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Captions as they are: the pipeline's call has prompts rewritten, unless told not to."""
    return {"encoder_hidden_states": pipe.encode_prompt(captions)[0]}


def _on_diagonal(sample: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = positions(sample, condition)
    places = torch.arange(len(ids["txt_ids"]), device=sample.device)[:, None]
    return {**ids, "txt_ids": ids["txt_ids"] + places * places.new_tensor([0, 1, 1])}


def mean_modulation(output: Tensor) -> Tensor:
    """Chroma computes every block's shifts, scales and gates of the timestep, [B, M, C]; the mean of them is our
    reading of its embedding."""
    return output.mean(dim=1)


_SHARED: dict[str, Any] = {"timestep_range": (0.0, 1.0), "sample_size": SAMPLE_SIZE, "is_packed": True}
_GRID: dict[str, Any] = {"sample_size": SAMPLE_SIZE, "patch_size": PATCH_SIZE, "begin": flux_extent}

FAMILIES = [
    Family(
        "FluxTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_text_embed.timestep_embedder",
            ("time_text_embed.text_embedder",),
            optional_taps=("time_text_embed.guidance_embedder",),
            **_GRID,
        ),
        call_flux,
        prompt_encoder("encoder_hidden_states", "pooled_projections"),
        takes_references=True,
        **_SHARED,
    ),
    # FLUX.1 schnell without its pooled text, so t+c is t. With gradient checkpointing, diffusers 0.42 does not tell
    # its single blocks the text's mask.
    Family(
        "ChromaTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks", "last")),
            "distilled_guidance_layer",
            reduce=mean_modulation,
            **_GRID,
        ),
        call_chroma,
        prompt_encoder("encoder_hidden_states", "", "attention_mask"),
        recomputes=False,
        **_SHARED,
    ),
    # Text enters by attention alone, so t+c is t; so it is in LongCat-Image.
    Family(
        "OvisImageTransformer2DModel",
        Transformer((Blocks("transformer_blocks"), Blocks("single_transformer_blocks")), "timestep_embedder", **_GRID),
        call_ovis,
        prompt_encoder("encoder_hidden_states"),
        **_SHARED,
    ),
    Family(
        "LongCatImageTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_embed.timestep_embedder",
            **_GRID,
        ),
        call_longcat,
        encode_for_longcat,
        **_SHARED,
    ),
    # Bria 3; padding of text is zeroed, not masked. Its pipeline cannot be put together without a VAE.
    Family(
        "BriaTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks"), Blocks("single_transformer_blocks")),
            "time_embed.timestep_embedder",
            **_GRID,
        ),
        call_bria,
        encode_for_bria,
        sample_size=SAMPLE_SIZE,
        is_packed=True,
        caption_parts=("vae",),
    ),
]
