"""TimeStep Master (arXiv 2503.07416): LoRA experts of ranges of the noise level, at several scales, and their router.

The paper's text was not at hand: its equations (3–7) are as a third party's code and tests quote them, `tsm` of
github.com/67372a/LyCORIS. No code of the authors was found.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError
from stagepatch.methods.lora_stages import Ranks, adapted_layers, are_alike, range_of, weigh_ranks

# Rows of ε: the timesteps of a schedule; other noise levels take the row that they are in.
_ROWS = 1000


class Router(nn.Module):
    """What experts count in each adapted layer: Δ(x) = B₁A₁x + Σ_{j>1} G_j ⊙ B_jA_jx, G = F(x) + ε(t) (Eq. 5, 6).

    Of each scale one expert is on, the one whose range the noise level is in (Eq. 7). The finest scale's is the core,
    and counts 1; the others are its context. F is a linear layer on the layer's input, ε(t) a row of a table; G is
    neither bounded nor normalised. Our reading: each layer has an F and an ε of its own, F sees each token by itself,
    and both start at zero, where the core is alone.

    Args:
        widths: of the layers' inputs, for F; empty leaves F out.
        num_layers: that are adapted.
        scales: experts of each, finest first.
        rank: of each expert.
    """

    def __init__(self, widths: Sequence[int], num_layers: int, scales: Sequence[int], rank: int) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.rank = rank
        contexts = len(scales) - 1
        self.times = nn.Parameter(torch.zeros(num_layers, _ROWS, contexts))
        self.inputs = nn.ModuleList(nn.Linear(width, contexts) for width in widths)
        for value in self.inputs.parameters():
            nn.init.zeros_(value)

    def are_on(self, noise_level: Tensor) -> Tensor:
        """1 for the experts that are on, 0 for the others: [B] -> [B, K]."""
        chosen = [F.one_hot(range_of(noise_level, count).long(), count) for count in self.scales]
        return torch.cat(chosen, dim=1)

    def forward(self, noise_level: Tensor) -> Tensor:
        """ε of every layer: [B] -> [B, layers, scales − 1]."""
        rows = torch.floor(noise_level * _ROWS + 1e-3).clamp(max=_ROWS - 1).long()
        return self.times.to(noise_level.device)[:, rows].transpose(0, 1)

    def input_gates(self, number: int, x: Tensor) -> Tensor:
        """F of a layer: [..., width] -> [..., scales − 1]."""
        layer: Any = self.inputs[number]
        weight, bias = (value.to(x.device) for value in (layer.weight, layer.bias))
        return F.linear(x.to(weight.dtype), weight, bias)

    def ranks(self, gates: Tensor, are_on: Tensor) -> Tensor:
        """Weights of the ranks, the experts' side by side: G [..., scales − 1] and experts on [..., K] -> [..., R]."""
        counts = torch.tensor(self.scales, device=gates.device)
        by_scale = torch.cat([torch.ones_like(gates[..., :1]), gates], dim=-1)
        return (by_scale.repeat_interleave(counts, dim=-1) * are_on).repeat_interleave(self.rank, dim=-1)


class RoutedRanks(Ranks):
    """Ranks that a router weighs, in each layer its own way.

    Without F, what counts in sampling is merged, and experts that are off are left out of it; with F it cannot be.

    Raises:
        UserError: layers that F cannot read.
    """

    # Of a forward, `weights` are ε [B, layers, scales − 1].

    def __init__(self, model: nn.Module, adapter: str, router: Router) -> None:
        super().__init__(model, adapter, router)
        self.router = router
        self.are_on: Tensor | None = None
        self._on: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "are_on": None, "_on": None}

    def _set_weights(self, noise_level: Tensor) -> None:
        self.weights, self.are_on = self.router(noise_level), self.router.are_on(noise_level)
        can_merge = self.merges and not self.router.inputs and not torch.is_grad_enabled()
        self.are_shared = can_merge and are_alike(noise_level.unsqueeze(1))
        if self.are_shared:
            self._on = self.are_on[0].repeat_interleave(self.router.rank).nonzero().squeeze(1)

    def _hook(self, number: int) -> Any:
        return _Routed(self, number)

    def _weighed(self, layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        assert self.weights is not None
        assert self.are_on is not None
        assert self._on is not None
        row = self.router.ranks(self.weights[0, self._layers.index(layer)], self.are_on[0])
        on = self._on.to(up.device)
        return down[on], up[:, on] * row.to(up.device)[on]

    def weigh_layer(self, number: int, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The ranks of one layer, weighed."""
        assert self.weights is not None
        assert self.are_on is not None
        times = self.weights[:, number]
        if not self.router.inputs:
            return weigh_ranks(module, output, self.router.ranks(times, self.are_on))
        shape = (len(times), *[1] * (x.ndim - 2), -1)
        times, are_on = (value.to(x.device).view(shape) for value in (times, self.are_on))
        weights = self.router.ranks(self.router.input_gates(number, x) + times, are_on)
        return output * weights.to(output.dtype)


class _Routed:
    """Hook on the first layer of an adapter. An object, so that copy.deepcopy(model) copies it with the model."""

    def __init__(self, ranks: RoutedRanks, number: int) -> None:
        self.ranks = ranks
        self.number = number

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.ranks.weigh_layer(self.number, module, args[0], output)


def make_router(model: nn.Module, adapter: str, kind: str, scales: Sequence[int], rank: int) -> Router:
    """A router for the adapters on a model, on its device.

    Raises:
        UserError: one that reads inputs, on convolutions.
    """
    layers = adapted_layers(model, adapter)
    widths = []
    if kind == "router":
        widths = [getattr(layer.lora_A[adapter], "in_features", 0) for layer in layers]
        if 0 in widths:
            raise UserError(
                "stage_gate='router' reads the inputs of linear layers, and targets has convolutions: leave these "
                "out, or take 'time_router'."
            )
    return Router(widths, len(layers), scales, rank).to(next(model.parameters()).device)
