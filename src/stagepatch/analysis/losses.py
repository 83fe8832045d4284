"""The loss at each timestep, and what was learned against the base from the same images and noise."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagepatch.analysis.result import Analysis
from stagepatch.analysis.samples import Samples
from stagepatch.checkpoints import load_denoiser
from stagepatch.core import UserError, processes
from stagepatch.diffusion import Objective
from stagepatch.families import learns_sigma
from stagepatch.methods import open_artifact
from stagepatch.report import Table, format_change
from stagepatch.training import sample_losses

_QUARTERS = 4

# Of every sample, [n, count], of 'base' and of each that was learned.
Losses = Mapping[str, Tensor]


@dataclass
class Estimate:
    """A mean and its standard error, over draws of image and noise."""

    mean: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95%, of the normal distribution; NaN where there is none."""
        return self.mean - 1.96 * self.error, self.mean + 1.96 * self.error


@torch.no_grad()
def loss_at_timesteps(model: nn.Module, objective: Objective, samples: Samples) -> Tensor:
    """The loss of every sample, [n, count] on the CPU: two calls with the same samples are paired number by number."""
    model.eval()
    rows = [
        [sample_losses(model, objective, draws).double().cpu() for draws in samples.at(timestep, model, objective)]
        for timestep in samples.timesteps
    ]
    return torch.stack([torch.cat(row) for row in rows])


def estimate(losses: Tensor) -> Estimate:
    """Mean over timesteps [m, count], each of which counts alike; the error is of the draws at each."""
    if losses.shape[1] < 2:
        return Estimate(float(losses.mean()), math.nan)
    variances = losses.var(dim=1) / losses.shape[1]
    return Estimate(float(losses.mean()), float(variances.sum().sqrt()) / len(losses))


def difference(base: Tensor, other: Tensor) -> Estimate:
    """Mean of other − base, paired: [m, count] each."""
    return estimate(other - base)


def relative_difference(base: Tensor, other: Tensor) -> Estimate:
    """Mean of other − base over mean of base; the error of the ratio, to first order, from the paired residuals."""
    scale = float(base.mean())
    if scale == 0.0:
        return Estimate(math.nan, math.nan)
    ratio = float((other - base).mean()) / scale
    return Estimate(ratio, estimate(other - base - ratio * base).error / abs(scale))


def analyze_losses(
    model: str, learned: Mapping[str, Path], base: nn.Module, objective: Objective, samples: Mapping[str, Samples]
) -> Analysis:
    """The base's loss over the timesteps, and its change with each that was learned.

    Args:
        model: where the base is loaded from.
        learned: directories of what methods learned on it, or of whole models, by name.
        samples: for each set of images.

    Raises:
        UserError: a directory that holds neither, or a model of another objective.
    """
    losses: dict[str, dict[str, Tensor]] = {images: {} for images in samples}
    for name, path in [("base", None), *learned.items()]:
        measured = base if path is None else load_other(model, path, objective)
        for images, source in samples.items():
            losses[images][name] = loss_at_timesteps(measured, objective, source)
    first = next(iter(samples.values()))
    timesteps, count = list(first.timesteps), first.count
    curves = {images: _curves(found) for images, found in losses.items()}
    parts = [*quarters(timesteps), slice(None)]
    single = [slice(place, place + 1) for place in range(len(timesteps))]
    note = (
        f"Mean loss over {count} draws of image and noise a timestep, by the model's own objective. Changes "
        f"are to the base from the same images, noise and timesteps, in brackets 95% intervals over these draws; "
        f"below zero is better than the base. ± standard error."
    )
    changes = ", and below its change with what was learned; bands: two standard errors." if learned else "."
    return Analysis(
        "losses",
        "Loss over timesteps",
        {"timesteps": timesteps, "samples": count, **curves},
        plot_losses(timesteps, curves),
        f"Loss at each timestep{changes}",
        [loss_table(f"Loss, {images}", found, timesteps, parts, note) for images, found in losses.items()],
        [loss_table(f"Loss at each timestep, {images}", found, timesteps, single) for images, found in losses.items()],
    )


def load_other(model: str, directory: Path, objective: Objective) -> nn.Module:
    """The base with what was learned on it, or the whole model that lies there.

    Raises:
        UserError: a directory that holds neither, or a model of another objective.
    """
    artifact = open_artifact(directory)
    is_model = artifact.kind == "model"
    other, scheduler = load_denoiser(directory if is_model else model)
    loaded: nn.Module = other.to(processes().device)
    if not is_model:
        artifact.put_on(loaded)
        return loaded
    theirs = Objective(scheduler, learns_sigma(loaded))
    for name in ("prediction_type", "learn_sigma", "num_train_timesteps"):
        if getattr(theirs, name) != getattr(objective, name):
            raise UserError(
                f"'{directory}' and '{model}' cannot be compared: {name} is {getattr(theirs, name)}, "
                f"not {getattr(objective, name)}."
            )
    return loaded


def _curves(losses: Losses) -> dict[str, dict[str, Any]]:
    """By name: the 'loss' at each timestep, and its 'difference' to the base, also 'relative'."""
    base = losses["base"]
    curves = {}
    for name, values in losses.items():
        curves[name] = {"loss": _curve(estimate, values)}
        if name != "base":
            curves[name]["difference"] = _curve(difference, base, values)
            curves[name]["relative"] = _curve(relative_difference, base, values)
    return curves


def _curve(function: Callable[..., Estimate], *losses: Tensor) -> dict[str, list[float]]:
    estimates = [function(*rows) for rows in zip(*(values.split(1) for values in losses), strict=True)]
    return {"mean": [value.mean for value in estimates], "error": [value.error for value in estimates]}


def plot_losses(timesteps: Sequence[int], curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Above, losses over timesteps; below, what was learned against the base, with bands of two standard errors.

    Args:
        curves: for each set of images, a column, the curves of the base and of each that was learned.
    """
    rows = 2 if any(len(by_name) > 1 for by_name in curves.values()) else 1
    figure = Figure(figsize=(6.2 * len(curves), 3.4 * rows), layout="constrained")
    lower: Any = None
    for column, (images, by_name) in enumerate(curves.items(), 1):
        axes: Any = figure.add_subplot(rows, len(curves), column)
        if rows == 2:
            lower = figure.add_subplot(2, len(curves), len(curves) + column, sharey=lower)
            lower.axhline(0.0, color="black", linewidth=0.8, linestyle="--")
            lower.set_ylabel("change of the loss [%]")
        for place, (name, curve) in enumerate(by_name.items()):
            color, width = (f"C{place - 1}", 1.0) if place else ("black", 1.6)
            axes.plot(timesteps, curve["loss"]["mean"], label=name, color=color, linewidth=width)
            if place:
                middle = 100.0 * np.asarray(curve["relative"]["mean"])
                band = 200.0 * np.nan_to_num(np.asarray(curve["relative"]["error"]))
                lower.plot(timesteps, middle, color=color, marker="o", markersize=3, linewidth=1, label=name)
                lower.fill_between(timesteps, middle - band, middle + band, color=color, alpha=0.2, linewidth=0)
        axes.set_title(images, fontsize=10)
        axes.set_ylabel("loss")
        if all(value > 0 for curve in by_name.values() for value in curve["loss"]["mean"]):
            axes.set_yscale("log")
    for axes in figure.axes:
        axes.set_xlabel("timestep (0: image, last: noise)")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def loss_table(title: str, losses: Losses, timesteps: Sequence[int], groups: Sequence[slice], note: str = "") -> Table:
    """The base's loss, and the change to it, over each group of timesteps.

    Args:
        groups: places in `timesteps`.
    """
    rows = []
    for group in groups:
        first, last = timesteps[group][0], timesteps[group][-1]
        base, *others = [values[group] for values in losses.values()]
        cells = [str(first) if first == last else f"{first} to {last}"]
        cells.append(f"{estimate(base).mean:.4g} ± {estimate(base).error:.1g}")
        for other in others:
            change = relative_difference(base, other)
            cells.append(format_change(change.mean, change.interval, 3, 100.0, " %"))
        rows.append(cells)
    return Table(title, ["timesteps", *losses], rows, note)


def quarters(timesteps: Sequence[int]) -> list[slice]:
    """Places of four equal parts of the timesteps, as many as DeMe's stages; fewer where they are fewer."""
    count = min(_QUARTERS, len(timesteps))
    edges = [round(place * len(timesteps) / count) for place in range(count + 1)]
    return list(itertools.starmap(slice, itertools.pairwise(edges)))
