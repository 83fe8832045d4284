"""The choices of the pictures that are made while a run trains."""

from dataclasses import dataclass, field

from stagepatch.sampling.config import SamplingConfig


@dataclass
class ValidationConfig:
    """Pictures while a run trains, from the same noise each time; they change nothing that is learned.

    Args:
        every: steps between pictures; 0 makes none. The last step has one.
        prompts: captions, in turn, for a model that takes them.
        classes: class labels, in turn, for a model that takes them; empty for all.
        sampling: sampler, guidance, count and seed.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=16, num_inference_steps=25))
