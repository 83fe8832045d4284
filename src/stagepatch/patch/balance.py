"""Balance losses, which keep a few prompts from taking all the weight (Eq. 11–13). Each is a scalar."""

import math

import torch
from torch import Tensor

EPSILON = 1e-5


def squared_coefficient_of_variation(values: Tensor) -> Tensor:
    """Population variance over squared mean, over the last dimension (Eq. 13)."""
    return values.var(dim=-1, correction=0) / (values.mean(dim=-1) ** 2 + EPSILON)


def importance_loss(weights: Tensor) -> Tensor:
    """Importance loss of weights [L, B, M]: of their sum over the blocks (Eq. 12, 13), mean over the batch."""
    return squared_coefficient_of_variation(weights.sum(dim=0)).mean()


def importance_loss_unbiased(weights: Tensor) -> Tensor:
    """Importance loss as in the released code: unbiased variance over batch and choices, summed over blocks."""
    flat = weights.flatten(1)
    return (flat.var(dim=1) / (flat.mean(dim=1) ** 2 + EPSILON)).sum()


def load_indicator(logits: Tensor) -> Tensor:
    """Choices switched off (logit below zero), mean over blocks and batch (Eq. 11). It has no gradient."""
    return (logits < 0).to(logits.dtype).sum(dim=-1).mean()


def load_surrogate(logits: Tensor) -> Tensor:
    """max(0, −logit) in place of the indicator: zero for the same logits, with a gradient for the others."""
    return torch.relu(-logits).sum(dim=-1).mean()


def load_smooth(logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, k: int) -> Tensor:
    """Load loss for noisy top-k gating (arXiv 1701.06538, Eq. 8–11), mean over the blocks.

    The load of a choice is the chance, over fresh noise on it alone, that it is among the top k.

    Args:
        logits, noisy_logits, noise_std: [L, B, M].
        k: choices selected, below M.
    """
    ranked = noisy_logits.topk(k + 1, dim=-1).values
    threshold_if_in, threshold_if_out = ranked[..., k : k + 1], ranked[..., k - 1 : k]
    is_in = noisy_logits > threshold_if_in
    threshold = torch.where(is_in, threshold_if_in, threshold_if_out)
    chance = 0.5 * (1.0 + torch.erf((logits - threshold) / noise_std / math.sqrt(2.0)))
    return squared_coefficient_of_variation(chance.sum(dim=1)).mean()
