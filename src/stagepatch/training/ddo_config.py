"""The choices of direct discriminative optimization."""

from dataclasses import dataclass, field

from stagepatch.core import check_numbers
from stagepatch.sampling import SamplingConfig


@dataclass
class DDOConfig:
    """Direct discriminative optimization (arXiv 2503.01103): tell training images from the model's own samples.

    Args:
        alpha: weight of the samples' term.
        beta: how steeply a difference in log-likelihood counts.
        max_denoising_change: the run ends, and keeps what it has, where the denoising loss of training images has
            risen by more than this share of what it was; 0 does not watch it. On the bench of docs/evidence.md,
            patches that raised it by more were better in as many sampling steps as their fakes had, and worse in more.
        fakes: directory of the samples of the model as it was, made first if they are not there; empty for 'fakes'
            in output_dir.
        sampling: how the samples are made, and how many; a flow model's own sampler takes the place of 'ddim'.
    """

    alpha: float = 1.0
    beta: float = 0.1
    max_denoising_change: float = 0.005
    fakes: str = ""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(num_inference_steps=25, num_images=30_000, batch_size=500)
    )

    def __post_init__(self) -> None:
        check_numbers(self, "ddo.", alpha=0, beta=0, max_denoising_change=0)
