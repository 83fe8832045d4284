"""GLM-Image: a decoder of tokens that a language model draws for a caption, and of the words that it is to write.

A site before every joint block, of the image's tokens, as in CogView4.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Extent
from stagepatch.families.cogview import DESCRIBE, before_shift, schedule_shift, sizes
from stagepatch.families.packing import SAMPLE_SIZE
from stagepatch.families.registry import Family, call_by_keywords, prompt_encoder
from stagepatch.families.texts import pad_texts, unpad_texts
from stagepatch.families.transformer import image_extent

# Pixels along each side of what one token of the language model stands for.
TOKEN = 32


def glm_image_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """See `image_extent`.

    Raises:
        UserError: images to edit, each of which is a forward of its own.
    """
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode is not None:
        raise UserError("GlmImageTransformer2DModel with images to edit cannot be patched yet: give a caption alone.")
    return image_extent(model, arguments)


def call_glm_image(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Zeros fill short texts up to the batch's longest, and are attended to, as in the pipeline's batches.

    As the pipeline does, it is told one less than the timestep before the schedule's shift.
    """
    text = pad_texts(unpad_texts(condition))["encoder_hidden_states"]
    shift = sample.new_tensor(schedule_shift(model, sample), dtype=torch.float32)
    shift = torch.where(condition["is_exponential"].view(-1), shift.exp(), shift)
    side = model.config.patch_size
    tokens = condition["prior_token_id"][:, : sample.shape[2] // side * (sample.shape[3] // side)]
    added = {
        "encoder_hidden_states": text,
        "prior_token_id": tokens,
        "prior_token_drop": condition["is_dropped"].expand(-1, tokens.shape[1]),
        **{name: value for name, value in sizes(sample).items() if name != "original_size"},
    }
    return call_by_keywords(model, sample, before_shift(timesteps + 1.0, shift) - 1.0, added)


def encode_captions(pipe: Any, captions: list[str], pictures: list[Tensor]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Of captions the words in quotation marks are read, which the picture is to show.

    Tokens are the picture's own, by the language model's own eyes, as those of pictures to edit are: tokens that it
    would draw for the caption are another picture's. The empty caption has none of them, as in guidance.
    """
    encode = prompt_encoder("text")
    rows = [picture_tokens(pipe, picture) for picture in pictures]
    is_exponential = pipe.scheduler.config.time_shift_type == "exponential"
    return {
        **pad_texts([encode(pipe, [caption])["text"][0] for caption in captions]),
        "prior_token_id": pad_texts(rows)["encoder_hidden_states"],
        "is_dropped": torch.tensor([[not caption] for caption in captions], device=pipe.device),
        "is_exponential": torch.full((len(captions), 1), is_exponential, device=pipe.device),
    }


def picture_tokens(pipe: Any, picture: Tensor) -> Tensor:
    """The language model's tokens of a picture, each four times, as the denoiser takes them, [N].

    The pipeline's own way to them, of pictures to edit, ends in an error (diffusers 0.42 with transformers 5).

    Args:
        picture: [1, 3, H, W] from −1 to 1.

    Raises:
        UserError: it is not cut into whole tokens.
    """
    height, width = picture.shape[-2:]
    if height % TOKEN or width % TOKEN or max(height, width) > 4 * min(height, width):
        raise UserError(
            f"GLM-Image reads pictures whose sides are multiples of {TOKEN} pixels and at most 4 : 1, not "
            f"{height}×{width}: set data.image_size and data.bucket_step so."
        )
    reader = pipe.processor.image_processor
    # It takes half of each side and would make small pictures larger, and large ones smaller; these bounds leave all.
    bounds = {"shortest_edge": 1, "longest_edge": max(height, width) ** 2}
    read = reader(images=pipe.image_processor.postprocess(picture), size=bounds, return_tensors="pt").to(pipe.device)
    grid, model = read["image_grid_thw"], pipe.vision_language_encoder
    features = model.get_image_features(read["pixel_values"], grid).pooler_output
    tokens = model.get_image_tokens(features, grid)
    _, *of_tokens = grid[0].tolist()
    doubled: Tensor = pipe._upsample_token_ids(tokens, *of_tokens)[0]
    return doubled


FAMILY = Family(
    "GlmImageTransformer2DModel",
    replace(DESCRIBE, sample_size=SAMPLE_SIZE, begin=glm_image_extent),
    call_glm_image,
    encode_captions,
    timestep_range=(-1.0, 999.0),
    sample_size=SAMPLE_SIZE,
    is_scaled_by_statistics=True,
    caption_parts=("processor", "vision_language_encoder"),
    reads_image=True,
)
