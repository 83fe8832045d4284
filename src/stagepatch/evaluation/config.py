"""What sampling and measuring take, for all that does both."""

from dataclasses import dataclass, field

from stagepatch.data.config import DataConfig
from stagepatch.sampling.config import SamplingConfig


@dataclass(kw_only=True)
class EvaluationConfig:
    """How models are sampled, and what their samples are measured against.

    Args:
        extractor: features for FID, KID, precision and recall: 'digits' (the bundled classifier's) or 'inception'
            (needs torch-fidelity).
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        data: training images, which are the references.
        sampling: sampler, guidance, count and seed.
    """

    extractor: str = "digits"
    cache: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=3000))
