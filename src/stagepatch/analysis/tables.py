"""Tables of `stagepatch analyze`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from stagepatch.analysis import estimate, relative_difference
from stagepatch.report.page import Table

_QUARTERS = 4


def loss_table(
    title: str,
    images: str,
    losses: Mapping[str, Tensor],
    timesteps: Sequence[int],
    groups: Sequence[slice],
    note: str = "",
) -> Table:
    """The base's loss, and the change to it, over each group of timesteps.

    Args:
        losses: of every sample, [n, count], of 'base' and of each that was learned.
        groups: places in `timesteps`.
    """
    rows = []
    for group in groups:
        first, last = timesteps[group][0], timesteps[group][-1]
        base, base_estimate = losses["base"][group], estimate(losses["base"][group])
        cells = [str(first) if first == last else f"{first} to {last}"]
        cells.append(f"{base_estimate.mean:.4g} ± {base_estimate.error:.1g}")
        for name, values in losses.items():
            if name != "base":
                change = relative_difference(base, values[group])
                cells.append(f"{100 * change.mean:+.3f} ± {100 * change.error:.3f} %")
        rows.append(cells)
    return Table(f"{title}, {images}", ["timesteps", *losses], rows, note)


def quarters(timesteps: Sequence[int]) -> list[slice]:
    """Places of four equal parts of the timesteps, as many as DeMe's stages; fewer where they are fewer."""
    count = min(_QUARTERS, len(timesteps))
    edges = [round(place * len(timesteps) / count) for place in range(count + 1)]
    return list(itertools.starmap(slice, itertools.pairwise(edges)))


def signed(value: float) -> str:
    """A cosine; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.3f}"
