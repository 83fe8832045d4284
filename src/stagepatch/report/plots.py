"""Plots with matplotlib's figures alone: no state is shared between them."""

from __future__ import annotations

import math
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


def metric_curves(series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, xlabel: str = "iteration") -> Figure:
    """Labelled lines of (iteration, value)."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3.5, label=label)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def gate_activation(weights: Tensor, timesteps: Tensor, site_names: Sequence[str]) -> Figure:
    """Weights [L, T, M] as a panel per block: timestep across, prompt upwards (DMP, Fig. 5)."""
    blocks = len(site_names)
    columns = min(4, blocks)
    rows = math.ceil(blocks / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows), layout="constrained")
    low, high = float(weights.min()), float(weights.max())
    extent = (float(timesteps[0]), float(timesteps[-1]), -0.5, weights.shape[2] - 0.5)
    panels = []
    for index, name in enumerate(site_names):
        axes = figure.add_subplot(rows, columns, index + 1)
        panel = axes.imshow(
            weights[index].T.numpy(), aspect="auto", origin="lower", extent=extent, vmin=low, vmax=high, cmap="viridis"
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("timestep", fontsize=8)
        axes.set_ylabel("prompt", fontsize=8)
        panels.append((axes, panel))
    figure.colorbar(panels[-1][1], ax=[axes for axes, _ in panels], label="weight")
    return figure
