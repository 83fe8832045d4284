"""The picture of a search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stagepatch.search.model_schedule import NONE, Choices

_BLUE, _GREY = "#1f4e8c", "#9db8d9"


def search_picture(
    values: Sequence[float],
    base: float | None,
    metric: str,
    is_low_better: bool,
    timesteps: Sequence[float],
    names: Sequence[str],
    chosen: Choices,
) -> Figure:
    """Above, the evaluations and the best so far; below, which model the best schedule has at each timestep.

    Args:
        values: of the metric, in the order of the evaluations.
        base: the base's at evenly spaced steps within the same budget, if there is room for any.
        timesteps: from noise to image.
        names: of the models.
        chosen: their numbers, for each timestep.
    """
    figure = Figure(figsize=(7.0, 4.0 + 0.35 * len(names)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.0, 0.6 + 0.4 * len(names)])
    numbers = range(1, len(values) + 1)
    best = itertools.accumulate(values, min if is_low_better else max)
    above.plot(numbers, values, linestyle="", marker="o", markersize=3, color=_GREY, label="a schedule")
    above.step(numbers, list(best), where="post", color=_BLUE, label="best so far")
    if base is not None:
        above.axhline(base, color="black", linewidth=0.8, linestyle="--", label="base, evenly spaced steps")
    above.set_xlabel("evaluations")
    above.set_ylabel(metric)
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(value > 0.0 for value in values):
        above.set_yscale("log")
    above.grid(alpha=0.25, which="both")
    above.legend(fontsize=8)
    kept = [(timestep, choice) for timestep, choice in zip(timesteps, chosen, strict=True) if choice != NONE]
    dropped = [timestep for timestep, choice in zip(timesteps, chosen, strict=True) if choice == NONE]
    below.plot([t for t, _ in kept], [choice for _, choice in kept], linestyle="", marker="s", color=_BLUE)
    below.plot(dropped, [-1] * len(dropped), linestyle="", marker="x", markersize=4, color="grey")
    rows = [*(["left out"] if dropped else []), *names]
    below.set_yticks(range(-1 if dropped else 0, len(names)), rows)
    below.set_ylim((-1.5 if dropped else -0.5), len(names) - 0.5)
    below.invert_xaxis()
    below.set_xlabel("timestep, from noise to image")
    below.grid(alpha=0.25)
    return figure
