"""A over B in one process: the two a moment apart, in turns the first; the median of the rounds' ratios.

Seconds are of processor time, so that other work on the machine counts for little; with an accelerator, of the wall.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Paired:
    """Seconds of A and of B, a round each."""

    first: list[float]
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        """A over B, in order of size."""
        return sorted(one / other for one, other in zip(self.first, self.second, strict=True))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the median, at 95 %, by the order of the ratios."""
        ratios = self.ratios
        rank = max(0, math.floor(len(ratios) / 2.0 - 0.98 * math.sqrt(len(ratios))))
        return ratios[rank], ratios[-1 - rank]

    def __str__(self) -> str:
        low, high = self.interval
        seconds = statistics.median(self.first), statistics.median(self.second)
        return (
            f"{statistics.median(self.ratios):.3f} ({low:.3f} to {high:.3f}, {len(self.ratios)} rounds; "
            f"{seconds[0]:.4g} / {seconds[1]:.4g} s)"
        )


def paired(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> Paired:
    """A and B, after one warm-up of each."""
    first(), second()
    result = Paired([], [])
    for number in range(rounds):
        if number % 2:
            result.first.append(seconds(first))
            result.second.append(seconds(second))
        else:
            result.second.append(seconds(second))
            result.first.append(seconds(first))
    return result


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes."""
    has_accelerator = torch.accelerator.is_available()
    clock = time.perf_counter if has_accelerator else time.process_time
    start = clock()
    call()
    if has_accelerator:
        torch.accelerator.synchronize()
    return clock() - start
