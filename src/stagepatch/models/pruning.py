"""Structured pruning of a DiT: whole heads and whole hidden channels of MLPs go (Diff-Pruning, arXiv 2305.10924).

The paper prunes U-Nets of convolutions. Here the tokens' width stays, and so do the places where blocks meet, so that
what is left is a DiT of another config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.models.dit import DiT

_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Kept:
    """What stays of a DiT, the same count in each block that stays.

    Args:
        blocks: [L], whether a block stays.
        heads: [L, H], whether a head does; rows of blocks that go say nothing.
        channels: [L, M], whether a hidden channel of the MLP does.
    """

    blocks: Tensor
    heads: Tensor
    channels: Tensor


def prune(model: Any, ratio: float) -> Any:
    """A copy without the heads and the hidden channels of least importance, as many in each block.

    Args:
        model: a DiT, with gradients on the weights of its blocks; it stays as it is.
        ratio: share of each block's heads, and of the hidden channels of its MLP, to remove, to the nearest whole
            number; at least one is left.

    Returns:
        A DiT in eval mode.

    Raises:
        UserError: another model than a DiT, one with parts of ours in it, or torch-pruning is not there.
    """
    heads, channels = (rank < _kept(rank.shape[1], ratio) for rank in ranks(model))
    return keep(model, Kept(torch.ones(len(heads), dtype=torch.bool), heads, channels))


def ranks(model: Any) -> tuple[Tensor, Tensor]:
    """Places of a DiT's heads [L, H] and hidden channels [L, M] within their block, 0 the most important.

    Importance is first-order Taylor's, Σ|w · ∂L/∂w| over the weights that go together, as torch-pruning sums it: of a
    head, its rows of queries, keys and values, and its columns of the output's map.

    Args:
        model: with gradients on the weights of its blocks.

    Raises:
        UserError: see `prune`.
    """
    check_prunable(model)
    import torch_pruning

    graph, importance = _graph(model), torch_pruning.importance.TaylorImportance()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in model.blocks:
        for layer, count, into in _layers(model, block, found):
            channels = list(range(layer.in_features))
            scores = importance(graph.get_pruning_group(layer, torch_pruning.prune_linear_in_channels, channels))
            rising = scores.cpu().view(count, -1).sum(dim=1).argsort(stable=True)
            into.append(count - 1 - rising.argsort())
    return torch.stack(found[0]), torch.stack(found[1])


def keep(model: Any, kept: Kept) -> Any:
    """A copy of a DiT with a part of its blocks, heads and hidden channels; it is a DiT too, in eval mode.

    Raises:
        UserError: see `prune`.
    """
    check_prunable(model)
    import torch_pruning

    pruned = copy.deepcopy(model)
    graph, remove = _graph(pruned), torch_pruning.prune_linear_in_channels
    for number, block in enumerate(pruned.blocks):
        for layer, count, stays in _layers(model, block, (kept.heads[number], kept.channels[number])):
            channels = torch.arange(layer.in_features).view(count, -1)[~stays].flatten().tolist()
            if channels:
                graph.get_pruning_group(layer, remove, channels).prune()
    pruned.blocks = nn.ModuleList(block for block, stays in zip(pruned.blocks, kept.blocks, strict=True) if stays)
    first = int(kept.blocks.int().argmax())
    config = {name: value for name, value in model.config.items() if not name.startswith("_")} | {
        "num_layers": len(pruned.blocks),
        "num_attention_heads": int(kept.heads[first].sum()),
        "attention_head_dim": model.blocks[0].attn.proj.in_features // model.config.num_attention_heads,
        "mlp_ratio": int(kept.channels[first].sum()) / model.hidden_size,
    }
    with torch.device("meta"):
        result = DiT(**config)
    result.to_empty(device=next(model.parameters()).device)
    result.positions = model.positions.clone()
    result.load_state_dict(pruned.state_dict())
    return result.eval()


def _layers(model: Any, block: Any, pair: tuple[_Of, _Of]) -> Iterator[tuple[nn.Linear, int, _Of]]:
    """The layers whose inputs go, how many there are of what goes, and each one's of a pair."""
    yield block.attn.proj, model.config.num_attention_heads, pair[0]
    yield block.mlp.fc2, model.blocks[0].mlp.fc2.in_features, pair[1]


def _graph(model: Any) -> Any:
    import torch_pruning

    return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=_example(model))


def check_prunable(model: nn.Module) -> None:
    """See that `prune` knows a model, and has what it needs.

    Raises:
        UserError: it does not.
    """
    if find_spec("torch_pruning") is None:
        raise UserError("prune needs torch-pruning: pip install 'stagepatch[pruning]'.")
    if not isinstance(model, DiT):
        raise UserError(f"prune is for stagepatch's DiT (DiT.from_diffusers makes one), not {type(model).__name__}.")
    if any(block.is_mixed for block in model.blocks):
        raise UserError("prune is for a DiT whose heads all attend, and this one has convolved_heads.")
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
