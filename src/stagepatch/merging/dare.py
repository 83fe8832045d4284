"""DARE (arXiv 2311.03099): task vectors of which a share is dropped at random, and the rest rescaled."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from stagepatch.core import seed_for
from stagepatch.merging.config import MergeMethod

_DARE = 201  # first part of the seeds


def drop(vectors: Sequence[Tensor], method: MergeMethod, name: str) -> list[Tensor]:
    """Task vectors of one tensor, one a stage, each by draws of its own: their expectation is what they were.

    Args:
        vectors: whole, on the CPU: what is drawn is peft's, in the order of their numbers.
        name: of the tensor: with the method's seed it decides what is drawn.
    """
    from peft.utils.merge_utils import prune  # slow to import

    with torch.random.fork_rng(devices=[]):  # peft draws from the CPU's own generator
        torch.default_generator.manual_seed(seed_for(_DARE, method.seed, zlib.crc32(name.encode())))
        return [prune(vector, 1.0 - method.dare_drop, "random", rescale=True) for vector in vectors]
