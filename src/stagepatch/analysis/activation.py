"""Gate activation: the weight of every prompt at every timestep and block (DMP, Fig. 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stagepatch.core.errors import UserError
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
        UserError: the patch has no gate, or is not attached to the model.
    """
    if patch.gate is None:
        raise UserError("A patch with gate='none' has no gate activation.")
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
