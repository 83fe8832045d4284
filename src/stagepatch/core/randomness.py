"""Randomness as a function of where a run is: no generator is carried from one iteration to the next."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator
from torch.utils.data import Sampler

# First parts of a seed, so that no two uses share a stream.
ORDER, NOISE, GLOBAL, STAGE, FAKES, CAPTION, CONFLICTS, TAGS, MASKS = 1, 2, 3, 4, 5, 6, 7, 8, 9


def seed_for(*parts: int) -> int:
    """A 63-bit seed from whole numbers, by NumPy's SeedSequence."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(device: torch.device, *parts: int) -> Generator:
    """A generator on the device, seeded by `seed_for`."""
    return Generator(device).manual_seed(seed_for(*parts))


@dataclass
class BatchOrder(Sampler[list[int]]):
    """Dataset indices of each iteration's share of one process.

    With one group, the data are shuffled anew for every epoch, and epochs follow one another without a gap, so every
    batch is full. With several, every batch is out of one group; in an epoch each group gives as many batches as it
    needs to show each item, the last one filled up with its first items, and the batches are shuffled.

    Args:
        groups: indices of items that a batch may hold together.
        batch_size: of all processes together.
        start, stop: iterations.
        seed: of the shuffles.
        process, num_processes: which share.
    """

    groups: Sequence[Sequence[int]]
    batch_size: int
    start: int
    stop: int
    seed: int
    process: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._gapless() if len(self.groups) == 1 else self._by_group()
        share = self.batch_size // self.num_processes
        for batch in batches:
            yield batch[self.process * share : (self.process + 1) * share]

    def _gapless(self) -> Iterator[list[int]]:
        (group,) = self.groups
        order_of = functools.lru_cache(1)(functools.partial(self._shuffled, len(group)))
        for first in range(self.start * self.batch_size, self.stop * self.batch_size, self.batch_size):
            positions = (divmod(position, len(group)) for position in range(first, first + self.batch_size))
            yield [group[order_of(epoch)[place]] for epoch, place in positions]

    def _by_group(self) -> Iterator[list[int]]:
        per_epoch = sum(math.ceil(len(group) / self.batch_size) for group in self.groups)
        batches_of = functools.lru_cache(1)(self._batches_of)
        for iteration in range(self.start, self.stop):
            yield batches_of(iteration // per_epoch)[iteration % per_epoch]

    def _batches_of(self, epoch: int) -> list[list[int]]:
        batches = []
        for number, group in enumerate(self.groups):
            order = self._shuffled(len(group), epoch, number)
            for first in range(0, len(group), self.batch_size):
                positions = [order[place % len(group)] for place in range(first, first + self.batch_size)]
                batches.append([group[position] for position in positions])
        return [batches[place] for place in self._shuffled(len(batches), epoch, len(self.groups))]

    def _shuffled(self, count: int, *parts: int) -> list[int]:
        generator = generator_for(torch.device("cpu"), ORDER, self.seed, *parts)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        return order
