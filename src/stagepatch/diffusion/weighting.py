"""Loss weightings by timestep.

The weightings of the literature are stated as weights w(SNR) on ‖x_start − x̂_start‖² (DeMe, arXiv 2410.06664,
supplement). A model that predicts something else has an error of c(SNR)·‖x_start − x̂_start‖², so its own squared error
is weighed by w/c:

    sample           c = 1
    epsilon          c = SNR
    v_prediction     c = SNR + 1          (x_start = α·x_t − σ·v, α² + σ² = 1)
    flow_prediction  c = (1 + √SNR)²      (x_start = x_t − σ·u, σ = 1 / (1 + √SNR))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.diffusion.config import WeightingConfig

# (snr [B], prediction type) -> weight [B] on the squared error of the prediction
Weighting = Callable[[Tensor, str], Tensor]

_LEAST_SNR = 1e-8  # at pure noise, where a prediction says nothing of x_start, the quotients stay finite


def make_weighting(config: WeightingConfig) -> Weighting:
    """The weighting that a config names.

    Raises:
        UserError: an unknown name, or a parameter out of range.
    """
    if config.name not in ("constant", *_ON_X_START):
        raise UserError(f"weighting '{config.name}' is none of constant, {', '.join(_ON_X_START)}.")
    if (config.gamma or 0.0) <= 0 or config.k <= 0:
        raise UserError(f"A weighting's gamma={config.gamma} and k={config.k} must be above 0.")
    if config.name == "constant":
        return constant
    on_x_start = _ON_X_START[config.name]

    def weighting(snr: Tensor, prediction_type: str) -> Tensor:
        snr = snr.clamp_min(_LEAST_SNR)
        return on_x_start(snr, config) / ERROR_FACTORS[prediction_type](snr)

    return weighting


def constant(snr: Tensor, prediction_type: str) -> Tensor:
    """Weight 1 on whatever is predicted: for epsilon the simple loss of DDPM (arXiv 2006.11239, Eq. 14)."""
    return torch.ones_like(snr)


# c by prediction type: a prediction's squared error over that of x_start, [B]
ERROR_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1.0,
    "sample": torch.ones_like,
    "flow_prediction": lambda snr: (1.0 + snr.sqrt()) ** 2,
}
_ON_X_START: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "snr": lambda snr, config: snr,
    "snr_plus_one": lambda snr, config: snr + 1.0,
    "truncated_snr": lambda snr, config: snr.clamp_min(1.0),
    "min_snr": lambda snr, config: snr.clamp_max(config.gamma),
    "p2": lambda snr, config: snr / (config.k + snr) ** config.gamma,
}
