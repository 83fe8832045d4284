"""Z-Image: a site before every refiner of the image and every joint block, in which the image comes before the text.

Its forward takes and gives lists, a tensor a sample. Image and text are filled up to 32 tokens; fill is not prompted.
"""

from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families.base import Extent
from stagepatch.families.packing import PATCH_SIZE, SAMPLE_SIZE
from stagepatch.families.registry import Family
from stagepatch.families.texts import pad_texts, unpad_texts
from stagepatch.families.transformer import Blocks, Transformer


def zimage_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """Read off the samples, each [C, F, H, W].

    Raises:
        UserError: samples of several sizes, or with images to edit, of which each sample is a list.
    """
    images, side = arguments["x"], arguments.get("patch_size", PATCH_SIZE[0])
    if isinstance(images[0], list):
        raise UserError("ZImageTransformer2DModel with images to edit cannot be patched yet: give one image a sample.")
    shapes = {tuple(image.shape[1:]) for image in images}
    if len(shapes) > 1:
        raise UserError(f"A patched forward takes samples of one size, and got {sorted(shapes)}: call each by itself.")
    frames, height, width = shapes.pop()
    return Extent((frames // arguments.get("f_patch_size", 1) * (height // side), width // side))


def call_zimage(model: Any, sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """See `Call`. The model predicts x_start − noise."""
    output = model(list(sample.unsqueeze(2)), timesteps, unpad_texts(condition), return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def encode_captions(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """See `EncodeCaptions`."""
    texts, _ = pipe.encode_prompt(list(captions), device=pipe.device, do_classifier_free_guidance=False)
    return pad_texts(texts)


FAMILY = Family(
    "ZImageTransformer2DModel",
    Transformer(
        (Blocks("noise_refiner"), Blocks("layers")),
        "t_embedder",
        sample_size=SAMPLE_SIZE,
        patch_size=PATCH_SIZE,
        begin=zimage_extent,
    ),
    call_zimage,
    encode_captions,
    timestep_range=(1.0, 0.0),
    sample_size=SAMPLE_SIZE,
    timestep_argument="t",
)
