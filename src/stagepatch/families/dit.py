"""The DiT of `stagepatch.models`, and diffusers' DiTTransformer2DModel: a site before every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stagepatch.families.base import Attention, Backbone, Extent, block_sites, cut_image, separate_attention, width


def describe_dit(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`."""
    config = model.config
    grid, begin = cut_image(config, sample_size, "sample")

    def attention(block: str) -> Attention:
        fused = f"{block}.attn.qkv"
        return Attention(fused, fused, fused, f"{block}.attn.proj", config.num_attention_heads)

    return Backbone(
        model_class="DiT",
        sites=block_sites("blocks", len(model.blocks), model.hidden_size, grid, attention=attention),
        time_tap="t_embedder",
        condition_taps=() if model.y_embedder is None else ("y_embedder",),
        condition_channels=model.hidden_size,
        grid=grid,
        begin=begin,
    )


def describe_diffusers_dit(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`.

    Every block embeds timestep and class itself, and drops classes on its own draw in train mode: keep the model in
    eval mode. The gate sees the first block's embedding, which is computed once more before that block.
    """
    config = model.config
    grid, begin_with_image = cut_image(config, sample_size)
    channels = width(config)
    blocks = model.transformer_blocks

    def begin(model: Any, arguments: dict[str, Any]) -> Extent:
        model.transformer_blocks[0].norm1.emb(
            arguments["timestep"], arguments["class_labels"], hidden_dtype=arguments["hidden_states"].dtype
        )
        return begin_with_image(model, arguments)

    return Backbone(
        model_class="DiTTransformer2DModel",
        sites=block_sites(
            "transformer_blocks",
            len(blocks),
            channels,
            grid,
            attention=lambda block: separate_attention(blocks[0].attn1, f"{block}.attn1"),
        ),
        time_tap="transformer_blocks.0.norm1.emb.timestep_embedder",
        condition_taps=("transformer_blocks.0.norm1.emb.class_embedder",),
        condition_channels=channels,
        grid=grid,
        begin=begin,
    )


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Of a DiT with conditioning 'text': CLIP's pooled and projected embedding."""
    tokens = pipe.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    pooled: Tensor = pipe.text_encoder(tokens.input_ids.to(pipe.device)).text_embeds
    return {"pooled_projections": pooled}
