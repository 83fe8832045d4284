"""The choices of what is looked at while a run trains."""

from dataclasses import dataclass, field

from stagepatch.core import check_numbers
from stagepatch.sampling.config import SamplingConfig


@dataclass
class ValidationConfig:
    """Pictures, and the loss on held-out images, while a run trains; they change nothing that is learned.

    Both are from the same noise each time, and of the average where there is one.

    Args:
        every: steps between pictures; 0 makes none. The last step has one.
        prompts: captions, in turn, for a model that takes them.
        classes: class labels, in turn, for a model that takes them; empty for all.
        sampling: of pictures: sampler, guidance, count and seed.
        loss_every: steps between measurements of the loss on images that are held out (see `data.held_out`), of the
            base and of what is learned, over four ranges of the noise level; 0 measures none. The last step has one.
        loss_images: how many of these images, at most.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=16, num_inference_steps=25))
    loss_every: int = 0
    loss_images: int = 64

    def __post_init__(self) -> None:
        check_numbers(self, "validation.", every=0, loss_every=0, loss_images=1, classes=0)
