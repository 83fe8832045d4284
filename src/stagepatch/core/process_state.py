"""This process among those of a launch."""

import re

import torch
from accelerate import PartialState

LEFT_ALONE = "Another process of this launch has ended; what it said tells why."
# What gloo and NCCL say when another process of the launch is gone.
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|gloo|NCCL|timed out", re.IGNORECASE)


def processes() -> PartialState:
    """Its index, their number, its device, and `wait_for_everyone`.

    accelerate takes processes that `torchrun` starts on CPUs for so many single ones unless it is told that they
    are on CPUs.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def is_left_alone(error: RuntimeError) -> bool:
    """Whether an error says that another process of this launch has ended."""
    return processes().num_processes > 1 and bool(_GONE.search(str(error)))
