"""Bria FIBO: a site before every double and every single block, of the tokens of the image that is made alone."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stagepatch.families.flux import joint_extent, positions
from stagepatch.families.registry import Family, call_by_keywords
from stagepatch.families.transformer import Blocks, Transformer

_SAMPLE_SIZE = (64, 64)  # of images of 1024×1024: the VAE makes them smaller by 16


def call_fibo(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Latent pixels are tokens. Each block gets a layer of the text encoder: the last ones, or where there
    are fewer layers than blocks, the last one several times."""
    tokens = sample.flatten(2).transpose(1, 2)
    count = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    layers = list(condition["text_encoder_layers"].unbind(dim=2))[-count:]
    mask = F.pad(condition["mask"].bool(), (0, tokens.shape[1]), value=True)
    arguments = {
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "text_encoder_layers": layers + layers[-1:] * (count - len(layers)),
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None, :]},
        **positions(sample, condition, cell=1),
    }
    output = call_by_keywords(model, tokens, timesteps, arguments)
    return output.transpose(1, 2).reshape(sample.shape)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Of the text encoder, every layer: [B, N, layers, D]. The pipeline asks its denoiser for
    the dtype."""
    if pipe.transformer is None:
        pipe.transformer = SimpleNamespace(dtype=pipe.text_encoder.dtype)
    embeds, _, _, mask, _, layers, _ = pipe.encode_prompt(captions, device=pipe.device, guidance_scale=1.0)
    return {"encoder_hidden_states": embeds, "text_encoder_layers": torch.stack(layers, dim=2), "mask": mask}


FAMILY = Family(
    "BriaFiboTransformer2DModel",
    Transformer(
        (Blocks("transformer_blocks"), Blocks("single_transformer_blocks", "after_text")),
        "time_embed.timestep_embedder",
        optional_taps=("guidance_embed.timestep_embedder",),
        sample_size=_SAMPLE_SIZE,
        patch_size=(1, 1),
        begin=joint_extent,
    ),
    call_fibo,
    encode_captions,
    sample_size=_SAMPLE_SIZE,
)
