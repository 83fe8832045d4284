"""What sampling and measuring take, for all that does both."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.data.config import DataConfig
from stagepatch.sampling.config import SamplingConfig


@dataclass(kw_only=True)
class EvaluationConfig:
    """How models are sampled, and what their samples are measured against.

    Args:
        extractor: features for FID, KID, precision and recall: 'digits', 'fashion' or 'fashion_vit' (bundled
            classifiers of such images), 'inception' ('inception_legacy' resizes as TensorFlow did), 'dinov2', 'clip'
            or 'siglip', the latter with a path or an id of the Hub too, as 'clip:/path' or 'clip:name/model@revision'.
            See docs/metrics.md.
        held_out: held-out images that are measured against: 'held_out', or 'tune', those of 'fashion' to choose
            settings by, so that what is reported was not chosen on the images that it is reported on.
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        data: training images, which are the references.
        sampling: sampler, guidance, count and seed.
    """

    extractor: str = "digits"
    held_out: Literal["held_out", "tune"] = "held_out"
    cache: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=3000))
