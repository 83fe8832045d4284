"""diffusers' U-Nets, UNet2DModel and UNet2DConditionModel: a site at every stage, and at every attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import (
    Attention,
    Backbone,
    Extent,
    Grid,
    Site,
    reference_size,
    separate_attention,
    square,
)
from stagepatch.families.registry import call_plainly


def describe_unet(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`.

    Sites of kind 'stage' are the inputs of the down blocks, the mid block and the up blocks; sites of kind
    'attention' are the inputs of their attentions (where text is attended to, of their transformers). The gate's
    reference grid is the sample's.
    """
    size = reference_size(sample_size, square(model.config.sample_size or 64))
    stages = _stages(model, size)
    attentions = [
        (f"{path}.attentions.{number}", module, grid)
        for path, _, grid in stages
        for number, module in enumerate(getattr(model.get_submodule(path), "attentions", None) or ())
        if module is not None
    ]
    conditions = ("class_embedding", "add_embedding")
    return Backbone(
        model_class="UNet2DConditionModel" if hasattr(model.config, "cross_attention_dim") else "UNet2DModel",
        sites=(
            *(Site(path, path, i, width, grid, "map", kind="stage") for i, (path, width, grid) in enumerate(stages)),
            *(_attention_site(path, i, module, grid) for i, (path, module, grid) in enumerate(attentions)),
        ),
        time_tap="time_embedding",
        condition_taps=tuple(name for name in conditions if getattr(model, name, None) is not None),
        condition_channels=model.time_embedding.linear_2.out_features,
        grid=size,
        begin=_begin,
    )


def _begin(model: Any, arguments: dict[str, Any]) -> Extent:
    return Extent(tuple(arguments["sample"].shape[2:]))


def _stages(model: Any, size: Grid) -> list[tuple[str, int, Grid]]:
    """Path, channels and grid of each stage's input, on the way down, in the middle, and up again."""
    widths = list(model.config.block_out_channels)
    stages, grids, channels = [], [size], widths[0]
    for number, block in enumerate(model.down_blocks):
        stages.append((f"down_blocks.{number}", channels, grids[-1]))
        channels = widths[number]
        if getattr(block, "downsamplers", None) is not None or getattr(block, "resnet_down", None) is not None:
            grids.append(tuple(-(-length // 2) for length in grids[-1]))
    if model.mid_block is not None:
        stages.append(("mid_block", channels, grids[-1]))
    for number, block in enumerate(model.up_blocks):
        stages.append((f"up_blocks.{number}", channels, grids[-1]))
        channels = widths[-1 - number]
        if getattr(block, "upsamplers", None) is not None or getattr(block, "resnet_up", None) is not None:
            grids.pop()
    return stages


def _attention_site(path: str, index: int, module: Any, grid: Grid) -> Site:
    blocks = getattr(module, "transformer_blocks", None)
    channels = module.in_channels if blocks is not None else module.query_dim
    attention = _self_attention(module, path) if blocks is None else _self_attention_in(blocks[0], path)
    return Site(path, path, index, channels, grid, "map", kind="attention", attention=attention)


def _self_attention_in(block: Any, path: str) -> Attention | None:
    """That of a transformer's first block, unless it attends to text alone."""
    if block.attn1.is_cross_attention:
        return None
    return separate_attention(block.attn1, f"{path}.transformer_blocks.0.attn1")


def _self_attention(module: Any, path: str) -> Attention | None:
    added = getattr(module, "added_kv_proj_dim", None) is not None
    return None if added or module.is_cross_attention else separate_attention(module, path)


def call_unet(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. SDXL is told the sample's own size, uncropped, as an image of eight times its size."""
    if "text_embeds" in condition:
        text_embeds = condition["text_embeds"]
        size = [8.0 * length for length in sample.shape[2:]]
        time_ids = sample.new_tensor([*size, 0.0, 0.0, *size]).repeat(len(sample), 1)
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        rest = {name: value for name, value in condition.items() if name != "text_embeds"}
        return call_plainly(model, sample, timesteps, {**rest, "added_cond_kwargs": added})
    return call_plainly(model, sample, timesteps, condition)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. SDXL has a second text encoder, and a pooled embedding."""
    if hasattr(pipe, "text_encoder_2"):
        embeds, _, pooled, _ = pipe.encode_prompt(captions, None, pipe.device, 1, False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}
    embeds, _ = pipe.encode_prompt(captions, pipe.device, 1, False)
    return {"encoder_hidden_states": embeds}
