"""ERNIE-Image: a site before every block, in which the image comes before the text, tokens before samples: [N, B, D].

Its pipeline divides by √(variance + 1e-5) where the VAE's config says 1e-4; samples here are as the config says.
"""

from typing import Any

from torch import Tensor

from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_cells
from stagepatch.families.registry import Family
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer


def call_ernie(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    lengths = condition["encoder_attention_mask"].sum(dim=1)
    text = {"text_bth": condition["encoder_hidden_states"], "text_lens": lengths}
    return call_cells(model, sample, timesteps, text)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Captions as they are, not rewritten by the pipeline's language model."""
    return pad_texts(pipe.encode_prompt(captions, pipe.device))


FAMILY = Family(
    "ErnieImageTransformer2DModel",
    Transformer(
        (Blocks("layers", layout="sequence"),), "time_embedding", sample_size=SAMPLE_SIZE, patch_size=PATCH_SIZE
    ),
    call_ernie,
    encode_captions,
    sample_size=SAMPLE_SIZE,
    is_packed=True,
)
