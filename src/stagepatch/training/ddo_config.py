"""The choices of direct discriminative optimization."""

from dataclasses import dataclass, field

from stagepatch.sampling import SamplingConfig


@dataclass
class DDOConfig:
    """Direct discriminative optimization (arXiv 2503.01103): tell training images from the model's own samples.

    Args:
        alpha: weight of the samples' term.
        beta: how steeply a difference in log-likelihood counts.
        fakes: directory of the samples of the model as it was, made first if they are not there; empty for 'fakes'
            in output_dir.
        sampling: how the samples are made, and how many.
    """

    alpha: float = 1.0
    beta: float = 0.1
    fakes: str = ""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(num_inference_steps=25, num_images=30_000, batch_size=500)
    )
