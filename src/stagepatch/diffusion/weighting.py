"""Loss weightings: a function of the signal-to-noise ratio and the prediction type, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (snr [B], prediction type) -> weight [B] on the squared error of the prediction
Weighting = Callable[[Tensor, str], Tensor]


def constant(snr: Tensor, prediction_type: str) -> Tensor:
    """Weight 1: the simple loss of DDPM (arXiv 2006.11239, Eq. 14)."""
    return torch.ones_like(snr)


WEIGHTINGS: dict[str, Weighting] = {"constant": constant}
