"""Randomness as a function of where a run is: no generator is carried from one iteration to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator
from torch.utils.data import Sampler

# First parts of a seed, so that no two uses share a stream.
ORDER, NOISE, GLOBAL = 1, 2, 3


def seed_for(*parts: int) -> int:
    """A 63-bit seed from whole numbers, by NumPy's SeedSequence."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(device: torch.device, *parts: int) -> Generator:
    """A generator on the device, seeded by `seed_for`."""
    return Generator(device).manual_seed(seed_for(*parts))


@dataclass
class BatchOrder(Sampler[list[int]]):
    """Dataset indices of each iteration's share of one process.

    The data are shuffled anew for every epoch; epochs follow one another without a gap, so every batch is full.

    Args:
        num_items: items of the dataset.
        batch_size: of all processes together.
        start, stop: iterations.
        seed: of the shuffles.
        process, num_processes: which share.
    """

    num_items: int
    batch_size: int
    start: int
    stop: int
    seed: int
    process: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.num_processes
        epoch, order = -1, torch.empty(0)
        for iteration in range(self.start, self.stop):
            first = iteration * self.batch_size + self.process * share
            indices = []
            for position in range(first, first + share):
                if position // self.num_items != epoch:
                    epoch = position // self.num_items
                    order = torch.randperm(
                        self.num_items, generator=generator_for(torch.device("cpu"), ORDER, self.seed, epoch)
                    )
                indices.append(int(order[position % self.num_items]))
            yield indices
