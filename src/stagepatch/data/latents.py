"""Images through a VAE, as the posterior that a denoiser's latents are drawn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w] of the latents of images [B, 3, H, W], scaled as the denoiser's input.

    Scaling and shift are the VAE's own (`scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`). An
    autoencoder without a posterior has standard deviation 0. In a video VAE an image is a video of one frame.
    """
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    images = images.to(vae.device, vae.dtype)
    encoded = vae.encode(images.unsqueeze(2) if is_video else images)
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    if is_video:
        mean, std = mean.squeeze(2), std.squeeze(2)
    config = vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift = mean.new_tensor(config["latents_mean"]).view(1, -1, 1, 1)
        scale = scale / mean.new_tensor(config["latents_std"]).view(1, -1, 1, 1)
    return (mean - shift) * scale, std * scale
