"""Gate activation: the weight of every prompt at every timestep and block (DMP, Fig. 5)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families import predict, sample_shape
from stagepatch.patch import Patch


@torch.no_grad()
def gate_activation(model: nn.Module, patch: Patch, timesteps: Tensor, label: int = 0) -> Tensor:
    """Weights [L, T, M] of the M choices at timesteps [T], on the CPU.

    Args:
        model: the denoiser that the patch is attached to.
        timesteps: [T].
        label: class shown to the model; it matters only where the gate sees t+c.

    Raises:
        UserError: the patch has no gate with weights, or is not attached to the model.
    """
    if patch.config.gate in ("none", "attention"):
        raise UserError(f"A patch with gate='{patch.config.gate}' has no weights over its prompts.")
    device = next(model.parameters()).device
    timesteps = timesteps.to(device)
    sample = torch.zeros(len(timesteps), *sample_shape(model), device=device)
    labels = torch.full((len(timesteps),), label, device=device)
    model.eval()
    patch.last = None
    predict(model, sample, timesteps, labels)
    if patch.last is None:
        raise UserError("The patch is not attached to this model: call patch.attach(model) first.")
    return patch.last.weights.float().cpu()


def plot_gate_activation(weights: Tensor, timesteps: Tensor, site_names: Sequence[str]) -> Figure:
    """Weights [L, T, M] as a panel per block: timestep across, prompt upwards (DMP, Fig. 5)."""
    columns = min(4, len(site_names))
    rows = math.ceil(len(site_names) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.6 * rows), layout="constrained")
    extent = (float(timesteps[0]), float(timesteps[-1]), -0.5, weights.shape[2] - 0.5)
    scale: dict[str, Any] = {"vmin": float(weights.min()), "vmax": float(weights.max()), "cmap": "viridis"}
    for place, (name, values) in enumerate(zip(site_names, weights, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        panel = axes.imshow(values.T.numpy(), aspect="auto", origin="lower", extent=extent, **scale)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("timestep", fontsize=8)
        axes.set_ylabel("prompt", fontsize=8)
    figure.colorbar(panel, ax=figure.axes, label="weight")
    return figure
