"""From logits to weights, and from weights to hidden states."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Off with autocast on the tensor's device: what is learned is computed in the dtype that it has."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def soft_weights(logits: Tensor, normalization: Literal["softmax", "mean_one", "sigmoid"] = "softmax") -> Tensor:
    """Softmax over the choices (Eq. 3), the same times their number, or a sigmoid each: [L, B, M] -> [L, B, M]."""
    if normalization == "sigmoid":
        return 2.0 * torch.sigmoid(logits)
    weights = torch.softmax(logits, dim=-1)
    return weights * logits.shape[-1] if normalization == "mean_one" else weights


def hard_weights(logits: Tensor, k: int, weight: Literal["one", "renormalized"]) -> Tensor:
    """Weights of the top k choices, zero for the others: [L, B, M] -> [L, B, M].

    With 'one' each chosen prompt has weight 1 (Table 4b). That has no gradient, so the softmax's stands in for it
    (straight-through). With 'renormalized' the softmax runs over the chosen alone.
    """
    chosen = logits.topk(k, dim=-1).indices
    mask = torch.zeros_like(logits).scatter(-1, chosen, 1.0)
    if weight == "renormalized":
        return torch.softmax(logits.masked_fill(mask == 0, -torch.inf), dim=-1)
    soft = torch.softmax(logits, dim=-1)
    return mask + (soft - soft.detach())


def gate_entropy(weights: Tensor) -> Tensor:
    """Entropy [nats] of weights [..., M] taken as shares of their sum: log M where all choices weigh the same."""
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    entropy: Tensor = torch.special.entr(shares)
    return entropy.sum(dim=-1)


def mix(prompts: Tensor, weights: Tensor | None) -> Tensor:
    """The weighed prompts of one site.

    Args:
        prompts: [N, D], or [K, N, D] for K sets; without weights, also [B, N, D].
        weights: [B, N] over prompts, [B, K] over sets, or None for weight 1 each.

    Returns:
        [B, N, D], or [1, N, D] without weights.
    """
    if weights is None:
        return prompts if prompts.ndim == 3 else prompts.unsqueeze(0)
    if prompts.ndim == 2:
        return weights.unsqueeze(-1) * prompts
    mixed: Tensor = (weights @ prompts.flatten(1)).unflatten(1, prompts.shape[1:])
    return mixed


def add_mixture(hidden_states: Tensor, prompts: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """hidden_states + scale · mixture in one fused operation (Eq. 3).

    Args:
        hidden_states: [B, N, D], or a map [B, D, H, W]; their dtype is kept.
        prompts: of that shape without B; for K sets with K in front.
        weights: [B, N] over prompts (N = H · W), [B, K] over sets, or None for weight 1 each; B may be 1.
    """
    prompts = prompts.to(hidden_states.dtype)
    if weights is None:
        return torch.add(hidden_states, prompts, alpha=scale)
    weights = weights.to(hidden_states.dtype)
    if prompts.ndim < hidden_states.ndim:
        by_position = weights.unsqueeze(-1) if prompts.ndim == 2 else weights.view(-1, 1, *prompts.shape[1:])
        return torch.addcmul(hidden_states, by_position, prompts, value=scale)
    weights = weights.expand(len(hidden_states), -1)
    with no_autocast(hidden_states):
        if not hidden_states.is_contiguous():
            # The strides are kept: with others, the next layer may round differently.
            return torch.add(hidden_states, (weights @ prompts.flatten(1)).view_as(hidden_states), alpha=scale)
        flat = torch.addmm(hidden_states.flatten(1), weights, prompts.flatten(1), alpha=scale)
    return flat.view_as(hidden_states)


def add_after_text(hidden_states: Tensor, mixture: Tensor, text_lengths: Tensor) -> Tensor:
    """hidden_states [B, S, D] + mixture [B, N, D], which in each sample starts behind its text, [B] tokens long."""
    positions = text_lengths.unsqueeze(1) + torch.arange(mixture.shape[1], device=text_lengths.device)
    positions = positions.unsqueeze(-1).expand_as(mixture)
    return hidden_states.scatter_add(1, positions, mixture.to(hidden_states.dtype))
