"""Embeddings of pictures, which stand in for captions where a prior makes such embeddings of these (Kandinsky 2.2)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.checkpoints.layout import find_model
from stagepatch.core import UserError, as_user_error

_PARTS = ("image_encoder", "image_processor")


def image_encoder_directories(source: str | Path) -> dict[str, Path]:
    """Directories of a model's image encoder and its processor, by name and in this order; where a whole pipeline has
    a prior of its own, they are the prior's.

    Raises:
        UserError: they do not lie beside the denoiser.
    """
    own, of_prior = ([f"{prefix}{part}" for part in _PARTS] for prefix in ("", "prior_"))
    directory = find_model(source, [*own, *of_prior])
    for names in (own, of_prior):
        if all((directory / name).is_dir() for name in names):
            return {name: directory / name for name in names}
    raise UserError(
        f"'{source}' is trained on embeddings of its pictures, by the image encoder of its prior, which is not beside "
        f"it: save both as one, by AutoPipelineForText2Image.from_pretrained('{source}').save_pretrained('DIRECTORY') "
        f"of diffusers, and give that directory."
    )


def load_image_embedder(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[Sequence[Tensor | None]], dict[str, Tensor]]:
    """What makes a denoiser's `image_embeds`, [B, C], of pictures [3, H, W] from −1 to 1, as diffusers' script for
    training Kandinsky 2.2 does; None is no picture, which the prior gives for an empty caption.

    Raises:
        UserError: it is not beside the denoiser, or cannot be loaded.
    """
    from diffusers.image_processor import VaeImageProcessor
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    encoder_path, processor_path = image_encoder_directories(source).values()
    with as_user_error(f"The image encoder in '{encoder_path}' cannot be loaded", OSError, ValueError, RuntimeError):
        processor = CLIPImageProcessor.from_pretrained(processor_path)
        encoder: Any = CLIPVisionModelWithProjection.from_pretrained(encoder_path, dtype=dtype)
    encoder = encoder.to(device).eval()

    @torch.no_grad()
    def embed(pictures: Sequence[Tensor | None]) -> dict[str, Tensor]:
        size = encoder.config.image_size
        rows = []
        for picture in pictures:
            if picture is None:
                pixels = torch.zeros(1, 3, size, size)
            else:
                image = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(picture[None] / 2 + 0.5))
                pixels = processor(image, return_tensors="pt").pixel_values
            rows.append(encoder(pixels.to(device, dtype)).image_embeds)
        return {"image_embeds": torch.cat(rows)}

    return embed
