"""What a patch's gate chooses: its activation (DMP, arXiv 2405.17825, Fig. 5) and its biases (Fig. 7).

Activation is the weight that multiplies a prompt as the patch computes it, σ(G([t; i])) of Eq. 3, on the gate's own
grid. With `normalization` 'softmax' (the default, the paper's) that is a softmax over the N prompts, which sums to 1
and is *not* multiplied by N; with 'mean_one' the same times N; with 'sigmoid' 2·sigmoid of each logit; with hard
selection what `hard_weight` says. The paper's formula and the released code (its `routing_mask`) have this softmax;
that it is what Fig. 5 and 7 draw is our reading.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagepatch.analysis.losses import quarters
from stagepatch.analysis.result import Analysis
from stagepatch.core import UserError
from stagepatch.families import Grid, find_denoiser, input_dtype, predict, sample_shape, takes_text
from stagepatch.patch import Patch, gate_entropy
from stagepatch.report import Table

# A class label, which an unconditional model is not told, or tensors by keyword, each of one row.
Condition = int | Mapping[str, Tensor]
_MARKED = 30  # points of a curve, up to so many, are marked


@torch.no_grad()
def gate_activation(
    model: nn.Module,
    patch: Patch,
    timesteps: Tensor,
    condition: Condition = 0,
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
    shape: tuple[int, int, int] | None = None,
) -> Tensor:
    """Weights [L, T, M] of the M choices at L sites and timesteps [T], on the CPU.

    M is the gate's reference grid, whatever the grid of a site: in a U-Net, where one gate on the sample's grid serves
    all sites, that of the sample. The model's blocks do not run: each forward ends at the first site, where the gate
    has answered. Model and patch are put in eval mode, so that the gate's noise is off.

    Args:
        model: the denoiser that the patch is attached to.
        timesteps: of 0 to 1000, as `predict` takes them.
        condition: shown to the model; it matters only where the gate sees t+c or t+text.
        batch_size: timesteps at a time.
        on_batch: called with the number of timesteps of a batch once it is done with.
        shape: C, H, W of the sample that the model is shown, by default its own; the gate does not see it.

    Raises:
        UserError: the patch has no gate with weights, or is not attached to the model; a class for a model of text.
    """
    if patch.config.gate in ("none", "attention"):
        raise UserError(f"A patch with gate='{patch.config.gate}' has no weights over its prompts.")
    denoiser = find_denoiser(model).eval()
    if isinstance(condition, int) and takes_text(denoiser):
        raise UserError(f"condition={condition} is a class, but the model takes text: give its tensors by keyword.")
    patch.eval()
    shape = shape or sample_shape(denoiser)
    parameter = next(denoiser.parameters())
    first = denoiser.get_submodule(patch.backbone.sites[0].module)
    found: list[Tensor] = []
    handle = first.register_forward_pre_hook(_stop)
    try:
        for part in timesteps.to(parameter.device).split(batch_size):
            patch.last = None
            sample = torch.zeros(len(part), *shape, device=parameter.device, dtype=input_dtype(denoiser))
            with suppress(_Answered):
                predict(denoiser, sample, part, _rows(condition, len(part), parameter))
            if patch.last is None:
                raise UserError("The patch is not on this model, or is off: call patch.attach(model) first.")
            found.append(patch.last.weights.expand(-1, len(part), -1).float().cpu())
            on_batch(len(part))
    finally:
        handle.remove()
    return torch.cat(found, dim=1)


class _Answered(Exception):
    """All that was to be seen of a forward has been."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _Answered


def _rows(condition: Condition, count: int, like: Tensor) -> Tensor | dict[str, Tensor]:
    """A condition for each of `count` samples, as `predict` takes it."""
    if isinstance(condition, int):
        return torch.full((count,), condition, device=like.device)
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype).expand(
            count, *value.shape[1:]
        )
        for name, value in condition.items()
    }


def temporal_bias(weights: Tensor) -> Tensor:
    """The mean of the activation over the prompts at each timestep (Fig. 7): [L, T, M] -> [L, T].

    Of weights that sum to 1 it is 1/M whatever the gate; where the gate sharpens, `gate_entropy` shows.
    """
    return weights.mean(dim=2)


def spatial_bias(weights: Tensor, grid: Grid) -> Tensor:
    """The activation's mean over the timesteps for each prompt (Fig. 7), on their grid: [L, T, M] -> [L, *grid]."""
    mean: Tensor = weights.mean(dim=1)
    return mean.view(len(mean), *grid)


def choice_grid(patch: Patch) -> Grid:
    """How a gate's choices lie: prompts that are added on their grid; prepended ones, and prompt sets, in a row."""
    is_on_grid = patch.config.position == "add" and patch.config.num_experts == 1
    return patch.gate_grid if is_on_grid else (1, patch.num_choices)


def analyze_gate(
    model: nn.Module,
    patch: Patch,
    timesteps: Tensor,
    conditions: Sequence[Condition] = (0,),
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
    shape: tuple[int, int, int] | None = None,
) -> list[Analysis]:
    """Activation, temporal bias with entropy, and spatial bias of a patch's gate.

    Args:
        timesteps: rising, see `gate_activation`.
        conditions: the activation is the mean over these, the entropy the mean of each one's entropy.
    """
    weights, entropy = torch.zeros(()), torch.zeros(())
    for condition in conditions:
        found = gate_activation(model, patch, timesteps, condition, batch_size, on_batch, shape)
        weights = weights + found / len(conditions)
        entropy = entropy + gate_entropy(found) / len(conditions)
    names = [site.name for site in patch.backbone.sites]
    steps: list[float] = timesteps.tolist()
    measured = (
        f"Activation: the weight that multiplies a prompt, normalization '{patch.config.normalization}'"
        + (f", {patch.config.selection} selection" if patch.config.selection == "hard" else "")
        + f"; {weights.shape[2]} choices"
        + (f"; mean over {len(conditions)} conditions" if len(conditions) > 1 else "")
        + ". "
    )
    settings = {
        "condition": patch.config.condition,
        "conditions": len(conditions),
        "normalization": patch.config.normalization,
        "selection": patch.config.selection,
        "choices": weights.shape[2],
        "timesteps": steps,
        "sites": names,
    }
    activation = Analysis(
        "gate_activation",
        "Gate activation",
        settings,
        plot_gate_activation(weights, timesteps, names),
        measured + "Over timesteps, a panel a block (as in Fig. 5 of arXiv 2405.17825).",
        [],
        [],
        {"activation": weights, "timesteps": timesteps},
    )
    return [activation, _temporal(weights, entropy, steps, names, measured), _spatial(weights, patch, names, measured)]


def _temporal(
    weights: Tensor, entropy: Tensor, steps: Sequence[float], names: Sequence[str], measured: str
) -> Analysis:
    bias, effective = temporal_bias(weights), entropy.exp()
    rows = []
    for group in quarters(range(len(steps))):
        cells = [bias[:, group].mean(), entropy[:, group].mean(), effective[:, group].mean(), weights[:, group].max()]
        rows.append([f"{steps[group][0]:g} to {steps[group][-1]:g}", *(f"{float(value):.4g}" for value in cells)])
    note = measured + (
        f"Temporal bias: its mean over the prompts (Fig. 7 of arXiv 2405.17825); of weights that sum to 1 it is 1/M = "
        f"{1.0 / weights.shape[2]:.4g} whatever the gate. Entropy [nats] of the weights as shares, log M = "
        f"{math.log(weights.shape[2]):.4g} where all prompts weigh the same; effective prompts: its exponential. "
        f"Means over blocks and timesteps, but for the largest."
    )
    columns = ["timesteps", "mean activation", "entropy", "effective prompts", "largest activation"]
    panels = {"mean activation over the prompts": bias, "effective prompts": effective}
    return Analysis(
        "temporal_bias",
        "Temporal bias of the gate",
        {"mean_activation": bias, "entropy": entropy, "effective_prompts": effective},
        plot_curves(panels, steps, names),
        "At each timestep, a line a block: mean of the activation over the prompts (Fig. 7 of arXiv 2405.17825), and "
        "how many prompts share it, the exponential of its entropy.",
        [Table("Gate over timesteps", columns, rows, note)],
        [],
    )


def _spatial(weights: Tensor, patch: Patch, names: Sequence[str], measured: str) -> Analysis:
    grid = choice_grid(patch)
    maps = spatial_bias(weights, grid)
    rows = []
    for name, values in zip(names, maps, strict=True):
        lowest, mean, highest = values.min(), values.mean(), values.max()
        rows.append([name, *(f"{float(value):.4g}" for value in (lowest, mean, highest, highest / lowest))])
    columns = ["block", "lowest", "mean", "highest", "highest / lowest"]
    note = measured + "Its mean over the timesteps, lowest to highest of the prompts."
    return Analysis(
        "spatial_bias",
        "Spatial bias of the gate",
        {"grid": list(grid), "mean_activation": maps},
        plot_spatial_bias(maps, names),
        f"Mean of the activation over the timesteps for each prompt, a panel a block (Fig. 7 of arXiv 2405.17825), on "
        f"the gate's grid of {' × '.join(map(str, grid))}{'; frames side by side' if len(grid) == 3 else ''}.",
        [],
        [Table("Activation by prompt", columns, rows, note)],
    )


def plot_gate_activation(weights: Tensor, timesteps: Tensor, site_names: Sequence[str]) -> Figure:
    """Weights [L, T, M] as a panel per block: timestep across, prompt upwards (DMP, Fig. 5)."""
    extent = (float(timesteps[0]), float(timesteps[-1]), -0.5, weights.shape[2] - 0.5)
    images = weights.transpose(1, 2)
    return _panels(images, site_names, "timestep", "prompt", "weight", aspect="auto", origin="lower", extent=extent)


def plot_spatial_bias(maps: Tensor, site_names: Sequence[str]) -> Figure:
    """Means [L, H, W] as a map over the image per block (DMP, Fig. 7); frames [L, F, H, W] side by side."""
    images = maps if maps.ndim == 3 else maps.transpose(1, 2).flatten(2)
    aspect = "auto" if images.shape[1] == 1 else "equal"
    return _panels(images, site_names, "column", "row", "mean weight", aspect=aspect)


def _panels(images: Tensor, site_names: Sequence[str], xlabel: str, ylabel: str, label: str, **options: Any) -> Figure:
    """Images [L, height, width], a panel each, on one scale."""
    columns = min(4, len(site_names))
    rows = math.ceil(len(site_names) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows), layout="constrained")
    scale: dict[str, Any] = {"vmin": float(images.min()), "vmax": float(images.max()), "cmap": "viridis"}
    for place, (name, values) in enumerate(zip(site_names, images, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        panel = axes.imshow(values.numpy(), **options, **scale)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel, fontsize=8)
    figure.colorbar(panel, ax=figure.axes, label=label)
    return figure


def plot_curves(
    panels: Mapping[str, Tensor],
    steps: Sequence[float],
    names: Sequence[str],
    xlabel: str = "timestep (0: image, last: noise)",
) -> Figure:
    """Values [L, T] as a panel for each title: a line a block, from the first (dark) to the last."""
    figure = Figure(figsize=(6.2 * len(panels), 3.4), layout="constrained")
    colors = colormaps["viridis"](torch.linspace(0.0, 0.9, len(names)).tolist())
    marker = "." if len(steps) <= _MARKED else ""
    for column, (title, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), column)
        for name, curve, color in zip(names, values, colors, strict=True):
            axes.plot(steps, curve.tolist(), label=name, color=color, linewidth=1.2, marker=marker)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0.0, 1.08 * float(values.max()))
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=max(1, len(names) // 12 + 1))
    return figure
