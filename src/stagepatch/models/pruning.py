"""Structured pruning of a DiT: whole heads and whole hidden channels of MLPs go (Diff-Pruning, arXiv 2305.10924).

The paper prunes U-Nets of convolutions. Here the tokens' width stays, and so do the places where blocks meet, so that
what is left is a DiT of another config.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from stagepatch.core import UserError
from stagepatch.models.dit import DiT


def prune(model: Any, ratio: float) -> Any:
    """A copy without the heads and the hidden channels of least importance, as many in each block.

    Importance is first-order Taylor's, Σ|w · ∂L/∂w| over the weights that go together, as torch-pruning sums it: of a
    head, its rows of queries, keys and values, and its columns of the output's map.

    Args:
        model: a DiT, with gradients on the weights of its blocks; it stays as it is.
        ratio: share of each block's heads, and of the hidden channels of its MLP, to remove, to the nearest whole
            number; at least one is left.

    Returns:
        A DiT in eval mode.

    Raises:
        UserError: another model than a DiT, one with parts of ours in it, or torch-pruning is not there.
    """
    check_prunable(model)
    import torch_pruning

    pruned = copy.deepcopy(model)
    for parameter, own in zip(pruned.parameters(), model.parameters(), strict=True):
        parameter.grad = own.grad
    graph = torch_pruning.DependencyGraph().build_dependency(pruned, example_inputs=_example(model))
    importance, remove = torch_pruning.importance.TaylorImportance(), torch_pruning.prune_linear_in_channels
    heads, widths = model.config.num_attention_heads, model.blocks[0].mlp.fc2.in_features
    for block in pruned.blocks:
        for layer, count in ((block.attn.proj, heads), (block.mlp.fc2, widths)):
            channels = torch.arange(layer.in_features).view(count, -1)
            scores = importance(graph.get_pruning_group(layer, remove, channels.flatten().tolist()))
            lowest = scores.cpu().view(count, -1).sum(dim=1).argsort(stable=True)[: count - _kept(count, ratio)]
            if len(lowest):
                graph.get_pruning_group(layer, remove, channels[lowest].flatten().tolist()).prune()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")} | {
        "num_attention_heads": _kept(heads, ratio),
        "attention_head_dim": model.blocks[0].attn.proj.in_features // heads,
        "mlp_ratio": _kept(widths, ratio) / model.hidden_size,
    }
    with torch.device("meta"):
        result = DiT(**config)
    result.to_empty(device=next(model.parameters()).device)
    result.positions = model.positions.clone()
    result.load_state_dict(pruned.state_dict())
    return result.eval()


def check_prunable(model: nn.Module) -> None:
    """See that `prune` knows a model, and has what it needs.

    Raises:
        UserError: it does not.
    """
    if find_spec("torch_pruning") is None:
        raise UserError("prune needs torch-pruning: pip install 'stagepatch[pruning]'.")
    if not isinstance(model, DiT):
        raise UserError(f"prune is for stagepatch's DiT (DiT.from_diffusers makes one), not {type(model).__name__}.")
    if any(name.startswith("stagepatch_") for name in model.state_dict()):
        raise UserError("prune does not go with projections or routing, which this model has.")


def _kept(count: int, ratio: float) -> int:
    return max(1, round(count * (1.0 - ratio)))


def _example(model: Any) -> dict[str, Any]:
    """Arguments of a forward, which the graph of layers is read off."""
    config = model.config
    device = next(model.parameters()).device
    arguments = {
        "sample": torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, device=device),
        "timestep": torch.zeros(1, device=device),
    }
    if config.conditioning == "class":
        arguments["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    elif config.conditioning == "text":
        arguments["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim, device=device)
    return arguments
