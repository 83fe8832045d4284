"""CogView3-Plus and CogView4: a site before every joint block, of the image's tokens. They embed sizes."""

from typing import Any

from torch import Tensor

from stagepatch.families.registry import NUM_TIMESTEPS, Family, call_by_keywords, prompt_encoder
from stagepatch.families.texts import pad_texts, unpad_texts
from stagepatch.families.transformer import Blocks, Transformer

DESCRIBE = Transformer(
    (Blocks("transformer_blocks"),),
    "time_condition_embed.timestep_embedder",
    ("time_condition_embed.condition_embedder",),
)


def sizes(sample: Tensor) -> dict[str, Tensor]:
    """The sample's own, as a whole image of eight times its size, [B, 2] each."""
    size = sample.new_tensor([8.0 * length for length in sample.shape[2:]]).repeat(len(sample), 1)
    return {"original_size": size, "target_size": size, "crop_coords": sample.new_zeros(len(sample), 2)}


def call_cogview3plus(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`."""
    return call_by_keywords(model, sample, timesteps, {**condition, **sizes(sample)})


def schedule_shift(model: Any, sample: Tensor) -> float:
    """m = ¼ + ¾ √(tokens / 256) of the schedules of CogView4 and GLM-Image."""
    height, width = (length // model.config.patch_size for length in sample.shape[2:])
    shift: float = 0.25 + 0.75 * (height * width / 256) ** 0.5
    return shift


def before_shift(timesteps: Tensor, shift: Tensor | float) -> Tensor:
    """What CogView4 is told at a noise level σ: T·t, where its pipeline's schedule has σ = m / (m + 1/t − 1). Other
    flows are told T·σ.

    Args:
        timesteps: T·σ, [B].
        shift: m.
    """
    level = timesteps / NUM_TIMESTEPS
    return NUM_TIMESTEPS * level / (shift * (1.0 - level) + level)


def call_cogview4(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Zeros fill short texts up to the batch's longest, and are attended to: the model adds its mask, of
    ones and zeros, to the attention's logits, which hides nothing (diffusers 0.42)."""
    text = pad_texts(unpad_texts(condition))["encoder_hidden_states"]
    told = before_shift(timesteps, schedule_shift(model, sample))
    return call_by_keywords(model, sample, told, {"encoder_hidden_states": text, **sizes(sample)})


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. One by one, as the pipeline encodes one: in a batch, short ones would be filled in front,
    and their tokens, which see the fill, would be others."""
    encode = prompt_encoder("text")
    return pad_texts([encode(pipe, [caption])["text"][0] for caption in captions])


FAMILIES = [
    Family("CogView3PlusTransformer2DModel", DESCRIBE, call_cogview3plus, prompt_encoder("encoder_hidden_states")),
    Family("CogView4Transformer2DModel", DESCRIBE, call_cogview4, encode_captions),
]
