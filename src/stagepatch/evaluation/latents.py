"""What sampling needs for a model of latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.checkpoints import has_vae, load_vae
from stagepatch.core import processes
from stagepatch.data import CachedLatents, DataConfig, decode_latents, make_cache
from stagepatch.sampling import Captions


@dataclass
class LatentSampling:
    """What `generate` takes for a model of latents.

    Args:
        shape: C, h, w of the latents.
        decode: makes images of them.
        captions: conditions of a model that takes captions.
    """

    shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    captions: Captions | None


def latent_sampling(model: str, data: DataConfig, cache: Path) -> LatentSampling | None:
    """How a model with a VAE is sampled: image i has the caption of the cache's item i modulo their number.

    Args:
        cache: its directory; it is made first if it is not there.

    Returns:
        None for a model without a VAE, which needs no more than its own shape.

    Raises:
        UserError: the directory holds the cache of something else, or the data cannot be had.
    """
    if not has_vae(model):
        return None
    make_cache(cache, model, data)
    cached = CachedLatents(cache)
    vae = load_vae(model).to(processes().device)

    def condition(indices: list[int]) -> dict[str, Tensor]:
        rows = [cached[index % len(cached)]["condition"] for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    null = cached.null_condition
    channels, height, width = cached[0]["image"].shape
    captions = None if null is None else Captions(condition, null)
    return LatentSampling((channels, height, width), lambda latents: decode_latents(vae, latents), captions)
