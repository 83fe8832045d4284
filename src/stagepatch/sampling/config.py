"""The choices of sampling."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.core import UserError, check_numbers


@dataclass
class SamplingConfig:
    """Sampler, steps, guidance and count.

    Args:
        scheduler: 'ddpm' (with the learned variance where the model has one), 'ddim', 'pndm', 'dpmsolver++', or the
            class name of any diffusers scheduler.
        num_inference_steps: denoising steps (DMP: 250 of DDPM; digits: 20 of DDIM).
        timestep_spacing: where the steps lie: 'leading' ends at 0 and starts below T − 1, 'trailing' starts at T − 1,
            where all is noise, and 'linspace' has both ends (arXiv 2305.08891, Table 2). Empty: as the model's
            scheduler says; 'ddpm' has linspace's.
        guidance_scale: classifier-free guidance; 1 is none (DMP: 1.5 for ImageNet and COCO).
        guidance_channels: channels that guidance acts on, 0 for all; the authors' DiT code guides the first 3.
        guidance_interval: least and most noise level t/T at which guidance acts (arXiv 2404.07724); elsewhere a step
            costs one forward. Pipelines guide everywhere, except by `guide`.
        guide: directory of what a method learned on this model, or of a model, that is worse: each output is moved
            away from the guide's (autoguidance, arXiv 2406.02507; SIMS, arXiv 2408.16333), which costs a second
            forward. Empty for none.
        guide_scale: how far, w of guide + w·(model − guide); 1 is not at all.
        num_images: images in all.
        batch_size: images denoised at a time; it does not change them.
        seed: image i depends on (seed, i) alone.
    """

    scheduler: str = "ddim"
    num_inference_steps: int = 20
    timestep_spacing: Literal["", "leading", "trailing", "linspace"] = ""
    guidance_scale: float = 1.0
    guidance_channels: int = 0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guide: str = ""
    guide_scale: float = 2.0
    num_images: int = 64
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UserError: by name of the setting.
        """
        counts = dict.fromkeys(("num_inference_steps", "num_images", "batch_size"), 1)
        check_numbers(self, "sampling.", **counts, guidance_channels=0, seed=0)


def check_interval(interval: list[float]) -> None:
    """Refuse what is not two noise levels."""
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise UserError(f"guidance_interval={interval} must be two noise levels from 0 to 1, rising.")
