"""The choices of sampling."""

from dataclasses import dataclass, field


@dataclass
class SamplingConfig:
    """Sampler, steps, guidance and count.

    Args:
        scheduler: 'ddpm' (with the learned variance where the model has one), 'ddim', 'pndm', 'dpmsolver++', or the
            class name of any diffusers scheduler.
        num_inference_steps: denoising steps (DMP: 250 of DDPM; digits: 20 of DDIM).
        guidance_scale: classifier-free guidance; 1 is none (DMP: 1.5 for ImageNet and COCO).
        guidance_channels: channels that guidance acts on, 0 for all; the authors' DiT code guides the first 3.
        guidance_interval: least and most noise level t/T at which guidance acts (arXiv 2404.07724); elsewhere a step
            costs one forward. Pipelines guide everywhere.
        num_images: images in all.
        batch_size: images denoised at a time; it does not change them.
        seed: image i depends on (seed, i) alone.
    """

    scheduler: str = "ddim"
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    guidance_channels: int = 0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    num_images: int = 64
    batch_size: int = 256
    seed: int = 0
