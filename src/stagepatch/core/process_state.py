"""This process among those of a launch."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Its index, their number, its device, and `wait_for_everyone`.

    accelerate takes processes that `torchrun` starts on CPUs for so many single ones unless it is told that they
    are on CPUs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
