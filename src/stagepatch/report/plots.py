"""Plots with matplotlib's figures alone: no state is shared between them."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

_CURVES = {
    "loss": "loss",
    "importance": "importance loss",
    "load": "load loss",
    "gate_entropy": "gate entropy [nats]",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images/s",
}

TRAINING_CAPTION = (
    "What is logged, over iterations: each value (pale) and its running mean (dark). Losses, norms and rates have no "
    "unit."
)
_MOST_LABELLED = 8  # cells of a matrix of up to so many rows hold their numbers


def training_curves(records: Sequence[Mapping[str, float]]) -> Figure:
    """A panel for each logged quantity over iterations; the loss with a running mean over it."""
    names = [name for name in _CURVES if any(name in record for record in records)]
    columns = min(3, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(figsize=(4.0 * columns, 2.6 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        kept = [record for record in records if name in record]
        x, y = [record["iteration"] for record in kept], [record[name] for record in kept]
        smooth = _running_mean(y, max(1, len(y) // 20))
        axes.plot(x, y, color="#9db8d9", linewidth=0.8)
        axes.plot(x, smooth, color="#1f4e8c", linewidth=1.4)
        axes.set_title(_CURVES[name], fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.25)
    return figure


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    return [float(np.nanmean(values[max(0, i - window) : i + window + 1])) for i in range(len(values))]


def metric_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], ylabel: str, xlabel: str = "iteration"
) -> Figure:
    """Labelled lines of (x, value)."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3.5, label=label)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def similarity_heatmaps(matrices: Mapping[str, Tensor], labels: Sequence[str], axis: str) -> Figure:
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
        values = np.ma.masked_invalid(matrix.double().numpy())
        panels.append(axes.imshow(values, vmin=-1.0, vmax=1.0, cmap="RdBu_r", origin="lower"))
        axes.set_title(title, fontsize=10)
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(list(shown), [labels[index] for index in shown], fontsize=8)
        axes.set_xlabel(axis)
        axes.set_ylabel(axis)
        if count <= _MOST_LABELLED:
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    color = "white" if abs(value) > 0.6 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(panels[-1], ax=figure.axes, label="cosine")
    return figure
