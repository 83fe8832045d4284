"""The DiT of `stagepatch.models`, and diffusers' DiTTransformer2DModel: a site before every block."""

from typing import Any

from torch import Tensor

from stagepatch.families.base import Extent
from stagepatch.families.registry import Family
from stagepatch.families.transformer import Blocks, Transformer, image_extent


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Of a DiT with conditioning 'text': CLIP's pooled and projected embedding."""
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    pooled: Tensor = pipe.text_encoder(tokens.input_ids.to(pipe.device)).text_embeds
    return {"pooled_projections": pooled}


def embed_early(model: Any, arguments: dict[str, Any]) -> Extent:
    """Every block embeds timestep and class itself, and drops classes on its own draw in train mode: keep the model in
    eval mode. The gate sees the first block's embedding, which is computed once more before that block.
    """
    model.transformer_blocks[0].norm1.emb(
        arguments["timestep"], arguments["class_labels"], hidden_dtype=arguments["hidden_states"].dtype
    )
    return image_extent(model, arguments)


_EMBEDDING = "transformer_blocks.0.norm1.emb"

FAMILIES = [
    Family(
        "DiT",
        Transformer((Blocks("blocks", attention="attn"),), "t_embedder", optional_taps=("y_embedder",)),
        encode_captions=encode_captions,
    ),
    Family(
        "DiTTransformer2DModel",
        Transformer(
            (Blocks("transformer_blocks", attention="attn1"),),
            f"{_EMBEDDING}.timestep_embedder",
            (f"{_EMBEDDING}.class_embedder",),
            begin=embed_early,
        ),
    ),
]
