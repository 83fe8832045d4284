"""Qwen-Image, and Nucleus-Image, which is like it: a site before every block, of the tokens of what is made alone."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Extent
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE, call_packed, split_references
from stagepatch.families.registry import Family, call_by_keywords
from stagepatch.families.texts import pad_texts
from stagepatch.families.transformer import Blocks, Transformer

# Latents of the layered model: the whole picture and four layers, of 640×640.
LAYERED_SIZE = (5, 80, 80)


def qwenimage_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Read off the shapes (frames, height, width) of each sample's images, the one that is made first; older pipelines
    give those of one sample for all. In the layered model all are made but the last.

    A model that edits (`zero_cond_t`) embeds zero after the samples' timesteps, for the images that it is given.
    """
    shapes = arguments["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    frames, height, width = shapes[0]
    is_layered = model.config.use_layer3d_rope
    grid = (frames * (len(shapes) - 1), height, width) if is_layered else (frames * height, width)
    return Extent(grid, rows=_own_rows(arguments) if model.config.zero_cond_t else None)


def _own_rows(arguments: dict[str, Any]) -> slice:
    return slice(len(arguments["timestep"]))


_BLOCKS, _TIME_TAP = (Blocks("transformer_blocks"),), "time_text_embed.timestep_embedder"
_DESCRIBE = Transformer(_BLOCKS, _TIME_TAP, sample_size=SAMPLE_SIZE, patch_size=PATCH_SIZE, begin=qwenimage_extent)
_DESCRIBE_LAYERED = Transformer(
    _BLOCKS, _TIME_TAP, sample_size=LAYERED_SIZE, patch_size=(1, *PATCH_SIZE), begin=qwenimage_extent
)


def describe_qwenimage(model: Any, sample_size: Any = None) -> Backbone:
    """See `Backbone`. The layered model's grid is layers × height × width."""
    return (_DESCRIBE_LAYERED if model.config.use_layer3d_rope else _DESCRIBE)(model, sample_size)


def call_qwenimage(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. Pictures to edit have their shapes behind the sample's.

    Raises:
        UserError: the layered model, which is told a picture and makes its layers.
    """
    if model.config.use_layer3d_rope:
        raise UserError(
            "This Qwen-Image makes the layers of a picture that it is given, each with its transparency: it trains on "
            "pictures with their layers, and data are whole, opaque pictures here. A patch can be put on it; train "
            "another Qwen-Image."
        )
    batch, _, height, width = sample.shape
    images = 1 + len(split_references(condition)[0])
    shapes = [[(1, height // 2, width // 2)] * images] * batch
    return call_packed(model, sample, timesteps, {**condition, "img_shapes": shapes})


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`. Pipelines that edit encode a caption alone as they would without images."""
    embeds, mask, *_ = pipe.encode_prompt(captions, device=pipe.device)
    mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()}


def encode_edits(pipe: Any, captions: list[str], pictures: list[Tensor]) -> dict[str, Tensor]:
    """See `EncodeEdits`. Captions are read one by one, with their pictures in the size in which the pipeline reads
    them: of Qwen-Image-Edit one, of 1024×1024 pixels in all, of later ones (Plus) several, of 384×384.

    Raises:
        UserError: a pipeline that does not edit, or several pictures for one that edits one.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    name, several = type(pipe).__name__, isinstance(pipe, plus.QwenImageEditPlusPipeline)
    if not several and (name != "QwenImageEditPipeline" or len(pictures[0]) > 1):
        raise UserError(
            f"{name} does not edit {len(pictures[0])} picture(s): Qwen-Image-Edit edits one, and "
            f"Qwen-Image-Edit-2509 and later several."
        )
    area = plus.CONDITION_IMAGE_SIZE if several else plus.VAE_IMAGE_SIZE
    texts = []
    for caption, given in zip(captions, pictures, strict=True):
        width, height = plus.calculate_dimensions(area, given.shape[-1] / given.shape[-2])
        images = [
            pipe.image_processor.resize(image, height, width) for image in pipe.image_processor.postprocess(given)
        ]
        texts.append(pipe.encode_prompt(caption, images if several else images[0], device=pipe.device)[0][0])
    padded = pad_texts(texts)
    return {
        "encoder_hidden_states": padded["encoder_hidden_states"],
        "encoder_hidden_states_mask": padded["encoder_attention_mask"],
    }


def qwenimage21_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """The image that is made is the last of each sample's shapes. Zero is embedded after the samples' timesteps, for
    text and images that are given.
    """
    frames, height, width = arguments["img_shapes"][0][-1]
    return Extent((frames * height, width), rows=_own_rows(arguments))


def call_qwenimage21(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. A latent pixel is a token; 2×2 of them are a place of the sequence of text and image.

    Raises:
        UserError: they do not come out even.
    """
    batch, _, height, width = sample.shape
    if height % 2 or width % 2:
        raise UserError(
            f"Qwen-Image 2.1 takes latents of even height and width, not {height}×{width}: let the images' sides be "
            f"multiples of 32 pixels (data.image_size, data.bucket_step)."
        )
    text = condition["encoder_hidden_states"].shape[1]
    is_image = torch.arange(text + height * width // 4, device=sample.device) >= text
    added = {"img_shapes": [[(1, height, width)]] * batch, "img_mask": is_image.expand(batch, -1)}
    tokens = call_by_keywords(model, sample.flatten(2).transpose(1, 2), timesteps, {**condition, **added})
    return tokens[:, -height * width :].transpose(1, 2).reshape(batch, -1, height, width)


def nucleus_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Read off the shapes (frames, height, width), one a sample."""
    frames, height, width = arguments["img_shapes"][0]
    return Extent((frames * height, width))


def call_nucleus(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The model predicts x_start − noise."""
    batch, _, height, width = sample.shape
    shapes = [(1, height // 2, width // 2)] * batch
    return -call_packed(model, sample, timesteps, {**condition, "img_shapes": shapes})


FAMILIES = [
    Family(
        "QwenImageTransformer2DModel",
        describe_qwenimage,
        call_qwenimage,
        encode_captions,
        timestep_range=(0.0, 1.0),
        sample_size=SAMPLE_SIZE,
        is_packed=True,
        takes_references=True,
        encode_edits=encode_edits,
    ),
    # Qwen-Image 2.1: one sequence of text, images that are given, and the one that is made. Its latents are smaller
    # by 16 than the image.
    Family(
        "QwenImage21Transformer2DModel",
        Transformer(
            (Blocks("transformer_blocks", "last"),),
            _TIME_TAP,
            sample_size=(64, 64),
            patch_size=(1, 1),
            begin=qwenimage21_extent,
        ),
        call_qwenimage21,
        encode_captions,
        timestep_range=(0.0, 1.0),
        sample_size=(64, 64),
    ),
    # Nucleus-Image, whose blocks mix experts; text is among the keys of attention, not in the sequence.
    Family(
        "NucleusMoEImageTransformer2DModel",
        replace(_DESCRIBE, begin=nucleus_extent),
        call_nucleus,
        encode_captions,
        timestep_range=(0.0, 1.0),
        sample_size=SAMPLE_SIZE,
        is_packed=True,
    ),
]
