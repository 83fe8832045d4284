"""HiDream-I1: a site before every double and every single block; the image's tokens come first, and are prompted."""

from typing import Any

from torch import Tensor

from stagepatch.families.packing import SAMPLE_SIZE
from stagepatch.families.registry import Family, prompt_encoder
from stagepatch.families.transformer import Blocks, Transformer

_LLAMA = "encoder_hidden_states_llama3"


def call_hidream(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The model predicts x_start − noise.

    In eval mode diffusers computes its mixtures of experts without gradients; in train mode, which they are left in,
    the same with gradients.
    """
    for module in model.modules():
        if hasattr(module, "moe_infer"):
            module.training = True
    condition = {**condition, _LLAMA: condition[_LLAMA].transpose(0, 1)}
    output: tuple[Tensor, ...] = model(sample, timesteps=timesteps, return_dict=False, **condition)
    return -output[0]


_ENCODE = prompt_encoder("encoder_hidden_states_t5", "", _LLAMA, "", "pooled_embeds")


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Of Llama, tokens of every layer: [B, layers, N, D], which the model takes layers first."""
    condition = _ENCODE(pipe, captions)
    return {**condition, _LLAMA: condition[_LLAMA].transpose(0, 1)}


FAMILY = Family(
    "HiDreamImageTransformer2DModel",
    Transformer(
        (Blocks("double_stream_blocks"), Blocks("single_stream_blocks")),
        "t_embedder",
        ("p_embedder",),
        sample_size=SAMPLE_SIZE,
    ),
    call_hidream,
    encode_captions,
    sample_size=SAMPLE_SIZE,
    timestep_argument="timesteps",
)
