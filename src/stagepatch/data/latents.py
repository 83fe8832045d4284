"""Images and videos through a VAE, as the posterior that a denoiser's latents are drawn from."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w] of the latents of images [B, 3, H, W], scaled as the denoiser's input;
    in a video VAE also [B, C, f, h, w] of videos [B, 3, F, H, W].

    Scaling and shift are the VAE's own (`scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`; in FLUX.2's,
    statistics of a batch norm over cells of 2×2 latent pixels). An autoencoder without a posterior has standard
    deviation 0. In a video VAE an image is a video of one frame. One of RGBA (Qwen-Image 2.1's) sees opaque images.
    """
    is_frame = _is_frame(vae, images)
    images = images.to(vae.device, vae.dtype)
    if vae.config.get("in_channels") == images.shape[1] + 1:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    encoded = vae.encode(images.unsqueeze(2) if is_frame else images)
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean = encoded.latents if _is_quantized(vae) else encoded.latent
        std = torch.zeros_like(mean)
    if is_frame:
        mean, std = mean.squeeze(2), std.squeeze(2)
    shift, scale = _shift_and_scale(vae, mean)
    return (mean - shift) * scale, std * scale


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] of a denoiser's latents [B, C, h, w], or videos: the other way."""
    latents = latents.to(vae.device, vae.dtype)
    shift, scale = _shift_and_scale(vae, latents)
    latents = latents / scale + shift
    is_frame = _is_frame(vae, latents)
    # A later VAE of LTX is told a timestep, which its pipelines leave at 0; MoVQ not to quantise.
    told: tuple[Any, ...] = (True,) if _is_quantized(vae) else ()
    told = (latents.new_zeros(len(latents)),) if vae.config.get("timestep_conditioning") else told
    images: Tensor = vae.decode(latents.unsqueeze(2) if is_frame else latents, *told, return_dict=False)[0]
    return (images.squeeze(2) if is_frame else images)[:, :3].clamp(-1.0, 1.0)


def _is_frame(vae: nn.Module, images: Tensor) -> bool:
    """Whether images are to a VAE of videos one frame each."""
    return images.ndim == 4 and any("Conv3d" in type(module).__name__ for module in vae.modules())


def _is_quantized(vae: nn.Module) -> bool:
    """Whether it is Kandinsky's MoVQ, whose denoiser makes latents of before quantisation, as they are."""
    return type(vae).__name__ == "VQModel"


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """The denoiser's latents are (the VAE's − shift) · scale."""
    if _is_quantized(vae):
        return 0.0, 1.0
    config, buffers = vae.config, dict(vae.named_buffers())
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    # LTX's VAE has them among its weights.
    mean, std = (config.get(name) or buffers.get(name) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (like.ndim - 2))
        shift = torch.as_tensor(mean).to(like).view(shape)
        scale = scale / torch.as_tensor(std).to(like).view(shape)
    if "batch_norm_eps" in config:
        shift = _tiled(vae.bn.running_mean, like)
        scale = 1.0 / _tiled((vae.bn.running_var + config["batch_norm_eps"]).sqrt(), like)
    return shift, scale


def _tiled(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of a cell of 2×2 latent pixels, [4C], at every pixel of latents [B, C, H, W]: [1, C, H, W]."""
    height, width = like.shape[2:]
    cells = values.to(like).view(1, -1, 2, 2).repeat(1, 1, -(-height // 2), -(-width // 2))
    return cells[:, :, :height, :width]
