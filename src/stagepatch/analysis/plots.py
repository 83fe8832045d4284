"""Plots of `stagepatch analyze`: similarities as heat maps, and losses over timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float]]
# 'mean' and its standard 'error', a number a timestep.
Curve = Mapping[str, Sequence[float]]

_WRITTEN = 8  # cells of a matrix of up to so many rows hold their numbers


def similarity_heatmaps(matrices: Mapping[str, Matrix], labels: Sequence[str], axis: str) -> Figure:
    """Cosines as a panel for each title, red above and blue below 0; what is NaN stays grey.

    Args:
        labels: of rows and columns.
        axis: what rows and columns are.
    """
    figure = Figure(figsize=(5.0 * len(matrices) + 0.6, 4.6), layout="constrained")
    count = len(labels)
    shown = range(0, count, max(1, -(-count // 10)))
    panels = []
    for place, (title, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), place + 1)
        axes.set_facecolor("#bbbbbb")
        values = np.ma.masked_invalid(np.asarray(matrix, dtype=float))
        panels.append(axes.imshow(values, vmin=-1.0, vmax=1.0, cmap="RdBu_r", origin="lower"))
        axes.set_title(title, fontsize=10)
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(list(shown), [labels[index] for index in shown], fontsize=8)
        axes.set_xlabel(axis)
        axes.set_ylabel(axis)
        if count <= _WRITTEN:
            _write_numbers(axes, values)
    figure.colorbar(panels[-1], ax=figure.axes, label="cosine")
    return figure


def _write_numbers(axes: Any, values: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def timestep_losses(
    timesteps: Sequence[int],
    losses: Mapping[str, Mapping[str, Curve]],
    changes: Mapping[str, Mapping[str, Curve]],
) -> Figure:
    """Above, losses over timesteps; below, what was learned against the base, with bands of two standard errors.

    Args:
        losses: for each set of images, a column, the curve of the base and of each that was learned.
        changes: for each set of images, the change of each that was learned as a share of the base's loss.
    """
    rows = 2 if any(changes.values()) else 1
    figure = Figure(figsize=(6.2 * len(losses), 3.4 * rows), layout="constrained")
    lower: Any = None
    for column, (images, curves) in enumerate(losses.items()):
        axes = figure.add_subplot(rows, len(losses), column + 1)
        for place, (name, curve) in enumerate(curves.items()):
            color, width = (f"C{place - 1}", 1.0) if place else ("black", 1.6)
            axes.plot(timesteps, curve["mean"], label=name, color=color, linewidth=width)
        axes.set_title(images, fontsize=10)
        axes.set_ylabel("loss")
        if all(value > 0 for curve in curves.values() for value in curve["mean"]):
            axes.set_yscale("log")
        _finish(axes)
        if rows == 1:
            continue
        lower = figure.add_subplot(2, len(losses), len(losses) + column + 1, sharey=lower)
        lower.axhline(0.0, color="black", linewidth=0.8, linestyle="--")
        for place, (name, curve) in enumerate(changes[images].items()):
            middle = 100.0 * np.asarray(curve["mean"])
            band = 200.0 * np.nan_to_num(np.asarray(curve["error"]))
            lower.plot(timesteps, middle, color=f"C{place}", marker="o", markersize=3, linewidth=1, label=name)
            lower.fill_between(timesteps, middle - band, middle + band, color=f"C{place}", alpha=0.2, linewidth=0)
        lower.set_ylabel("change of the loss [%]")
        _finish(lower)
    return figure


def _finish(axes: Any) -> None:
    axes.set_xlabel("timestep (0: image, last: noise)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
