"""What sampling needs for a model of latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.checkpoints import has_vae, load_captioner, load_vae, takes_captions
from stagepatch.core import UserError, processes
from stagepatch.data import DataConfig, decode_latents, make_cache, open_cache
from stagepatch.families import sample_shape
from stagepatch.sampling.generation import Captions, spread


@dataclass
class LatentSampling:
    """What `generate` takes for a model of latents, or of captions in pixels.

    Args:
        shape: C, h, w of what the model makes.
        decode: makes images of it.
        captions: conditions of a model that takes captions.
    """

    shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    captions: Captions | None


def latent_sampling(
    model: str, data: DataConfig, cache: Path, text_dtype: torch.dtype = torch.float32
) -> LatentSampling | None:
    """How a model with a VAE, or of captions, is sampled: any number of images has first captions of items from all
    over the cache.

    Args:
        cache: its directory; it is made first if it is not there.
        text_dtype: that text encoders are loaded in for it.

    Returns:
        None for any other, which needs no more than its own shape.

    Raises:
        UserError: the directory holds the cache of something else, or the data cannot be had.
    """
    if not has_vae(model) and not takes_captions(model):
        return None
    if data.num_frames > 1:
        raise UserError(f"data.num_frames={data.num_frames}: here images are sampled, not videos. Leave it at 1.")
    make_cache(cache, model, data, text_dtype=text_dtype)
    cached = open_cache(cache, data)
    if "references" in cached[0]:
        raise UserError(f"The images of '{data.source}' are edits of pictures, and here samples are made of captions.")
    decode = load_decoder(model)

    def condition(indices: list[int]) -> dict[str, Tensor]:
        items = spread(len(cached), max(indices) + 1)[indices].tolist()
        rows = [cached[item]["condition"] for item in items]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    null = cached.null_condition
    channels, height, width = cached[0]["image"].shape
    captions = None if null is None else Captions(condition, null)
    return LatentSampling((channels, height, width), decode, captions)


def load_decoder(source: str) -> Callable[[Tensor], Tensor]:
    """A model's VAE, on this process's device, as what makes images of latents; without one they are images."""
    if not has_vae(source):
        return lambda images: images
    vae = load_vae(source).to(processes().device)
    return lambda latents: decode_latents(vae, latents)


def prompted_latents(
    source: str, model: Any, prompts: Sequence[str], text_dtype: torch.dtype = torch.float32
) -> LatentSampling | None:
    """How a model whose VAE, tokenizer or text encoder lie beside it is sampled: image i has prompt i modulo theirs.

    Args:
        source: the model's directory.
        model: its denoiser, loaded.
        text_dtype: that text encoders are loaded in.

    Returns:
        None for a model in pixels without captions.

    Raises:
        UserError: a model of captions without prompts, or without what encodes them.
    """
    reads_captions = takes_captions(source)
    if not has_vae(source) and not reads_captions:
        return None
    device, captions = processes().device, None
    if reads_captions:
        if not prompts:
            raise UserError(f"'{source}' makes images of captions: give --prompts '[\"a caption\", …]'.")
        encode = load_captioner(source, device, text_dtype)
        encoded = encode(list(prompts))

        def condition(indices: list[int]) -> dict[str, Tensor]:
            return {name: value[[index % len(prompts) for index in indices]] for name, value in encoded.items()}

        captions = Captions(condition, encode([""]))
    return LatentSampling(sample_shape(model), load_decoder(source), captions)
