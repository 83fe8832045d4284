"""What sampling needs for a model of latents."""

from __future__ import annotations

import torch
from torch import Tensor

from stagepatch.backbones import load_vae
from stagepatch.data import CachedLatents, decode_latents
from stagepatch.evaluation.paired import LatentSampling
from stagepatch.processes import processes
from stagepatch.sampling import Captions


def latent_sampling(model: str, cached: CachedLatents) -> LatentSampling:
    """How a model with a VAE is sampled: image i has the caption of the cache's item i modulo their number."""
    vae = load_vae(model).to(processes().device)

    def condition(indices: list[int]) -> dict[str, Tensor]:
        rows = [cached[index % len(cached)]["condition"] for index in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    null = cached.null_condition
    channels, height, width = cached[0]["image"].shape
    captions = None if null is None else Captions(condition, null)
    return LatentSampling((channels, height, width), lambda latents: decode_latents(vae, latents), captions)
