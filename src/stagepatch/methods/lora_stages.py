"""What each rank of a LoRA counts at a noise level, and the layer that it comes to where that is one for all samples.

T-LoRA's mask of ranks (arXiv 2507.05964), and gates that mix K low-rank maps: by formulas of the noise level, or by a
table of ranges of it (Remix-DiT, arXiv 2412.05628). A gate of each layer's own is in `lora_router`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError
from stagepatch.families import describe
from stagepatch.families.registry import family_of

GATES = ("gaussian", "learned", "ranges")
# noise levels [B] in 0…1 -> weights [B, R] of the ranks
Weigh = Callable[[Tensor], Tensor]


def active_ranks(noise_level: Tensor, rank: int, min_rank: int) -> Tensor:
    """Ranks that are on at a noise level t/T in 0…1: ⌊(1 − t/T)·(rank − min_rank)⌋ + min_rank (T-LoRA, Sec. 3.2)."""
    # What is whole is whole, whatever float32 makes of it.
    return torch.floor((1.0 - noise_level) * (rank - min_rank) + 1e-4) + min_rank


def rank_mask(noise_level: Tensor, rank: int, min_rank: int) -> Tensor:
    """1 for the ranks that are on, 0 for the others: [B] -> [B, R]."""
    active = active_ranks(noise_level, rank, min_rank)
    return (torch.arange(rank, device=active.device) < active.unsqueeze(1)).float()


def range_of(noise_level: Tensor, count: int) -> Tensor:
    """Which of `count` equal ranges a noise level is in, as floats: the one with k/count ≤ l < (k + 1)/count."""
    # A border is the next range's, whatever float32 makes of it.
    return torch.floor(noise_level * count + 1e-5).clamp(max=count - 1)


class StageGate(nn.Module):
    """Weights of K stages at a noise level l; they sum to 1.

    Gaussians with centres c_k = (k + ½)/K and standard deviation s = 1/(2K), over their sum: that is the softmax of
    −(l − c_k)²/(2s²), and, less what all k share, of (l·c_k − c_k²/2)/s². So it is a linear layer of l and a softmax,
    and a gate that is learned starts as the Gaussians, and is of the same form.

    Args:
        num_stages: K.
        rank: of each stage's map.
        kind: 'gaussian'; 'learned'; or 'ranges', 1 for the stage with k/K ≤ l < (k + 1)/K, 0 for the others.
    """

    def __init__(self, num_stages: int, rank: int, kind: str = "gaussian") -> None:
        super().__init__()
        self.num_stages = num_stages
        self.rank = rank
        self.kind = kind
        centres = (torch.arange(num_stages) + 0.5) / num_stages
        precision = (2.0 * num_stages) ** 2
        self.weight = nn.Parameter(precision * centres, requires_grad=kind == "learned")
        self.bias = nn.Parameter(-0.5 * precision * centres.square(), requires_grad=kind == "learned")

    def stages(self, noise_level: Tensor) -> Tensor:
        """Weights of the stages: [B] -> [B, K]."""
        levels = noise_level.unsqueeze(1)
        if self.kind == "ranges":
            stage = range_of(levels, self.num_stages)
            return (stage == torch.arange(self.num_stages, device=levels.device)).float()
        # No matrix product, which autocast would do in half precision.
        return torch.softmax(levels * self.weight.to(levels.device) + self.bias.to(levels.device), dim=1)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Weights of the ranks, the stages' side by side: [B] -> [B, K·rank]."""
        return self.stages(noise_level).repeat_interleave(self.rank, dim=1)


class TableGate(nn.Module):
    """Weights of K stages in each of N ranges of the noise level: softmax(π_i), π learned [N, K] (Remix-DiT, Alg. 2).

    One table for all layers, as the paper prefers (Table 2, global mixer). π starts at random, with a lead of three
    standard deviations for one stage, ⌊i·K/N⌋ (the released code; where K divides N, that is its prior).

    Args:
        num_stages: K.
        rank: of each stage's map.
        num_ranges: N.
    """

    def __init__(self, num_stages: int, rank: int, num_ranges: int) -> None:
        super().__init__()
        self.num_ranges = num_ranges
        self.rank = rank
        lead = F.one_hot(self._prior(num_stages), num_stages)
        self.logits = nn.Parameter(torch.randn(num_ranges, num_stages) + 3.0 * lead)

    def _prior(self, num_stages: int) -> Tensor:
        return torch.arange(self.num_ranges) * num_stages // self.num_ranges

    def stages(self, noise_level: Tensor) -> Tensor:
        """Weights of the stages: [B] -> [B, K]."""
        rows = self.logits.to(noise_level.device)[range_of(noise_level, self.num_ranges).long()]
        return torch.softmax(rows, dim=1)

    def forward(self, noise_level: Tensor) -> Tensor:
        """Weights of the ranks, the stages' side by side: [B] -> [B, K·rank]."""
        return self.stages(noise_level).repeat_interleave(self.rank, dim=1)

    def prior_loss(self) -> Tensor:
        """−log of the weight of each range's own stage, mean over ranges (Remix-DiT, Eq. 6, over N)."""
        return F.cross_entropy(self.logits, self._prior(self.logits.shape[1]).to(self.logits.device))


class Ranks:
    """What the ranks of the adapters on a model count in this forward, for each sample; the same in all layers.

    Hooks on the model and on the adapters' first layers; the model's parameters and names stay as they are. Between a
    forward with gradient checkpointing and its backward, run no other forward.

    Args:
        model: with adapters on it.
        adapter: their name.
        weigh: what the ranks count; None where it is 1 at all times.

    Raises:
        UserError: adapters of embeddings, whose ranks cannot be weighed, or a model with layers that take tokens
            before samples, or further timesteps than the samples'.
    """

    # Hooks are methods rather than closures, so that copy.deepcopy(model) copies them with it.

    def __init__(self, model: nn.Module, adapter: str, weigh: Weigh | None = None) -> None:
        self.adapter = adapter
        self.weigh = weigh
        self.weights: Tensor | None = None
        self.merges = False
        self.are_shared = weigh is None
        self._layers = adapted_layers(model, adapter)
        if weigh is None:
            return
        if any(adapter in getattr(part, "lora_embedding_A", ()) for part in model.modules()):
            raise UserError("Ranks that differ by timestep cannot be had on embeddings: leave them out of targets.")
        if any(site.layout == "sequence" for site in describe(model).sites):
            raise UserError(
                f"Ranks that differ by timestep cannot be had on {type(model).__name__}, some of whose layers take "
                f"tokens before samples: take one stage."
            )
        if getattr(model.config, "zero_cond_t", False):
            raise UserError(
                f"Ranks that differ by timestep cannot be had on {type(model).__name__} with zero_cond_t, some of "
                f"whose layers take timestep 0 beside the samples': take one stage."
            )
        self._names = list(inspect.signature(model.forward).parameters)
        family = family_of(type(model))
        self._timestep, self._levels = family.timestep_argument, family.sample_levels
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, layer in enumerate(self._layers):
            layer.lora_A[adapter].register_forward_hook(self._hook(number))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None}  # of one forward; and what has a history is not copied

    def merge(self, enabled: bool = True) -> None:
        """Whether a forward without gradients, its timesteps alike, is done with W + B·diag(w)·A in W's place.

        That is made anew in each forward and stored nowhere: W stays what it is, and nothing can be out of date. What
        keeps it over several forwards is `MergedWeights`.
        """
        self.merges = enabled
        for layer in self._layers:
            if enabled and "forward" not in vars(layer):
                layer.forward = MergedForward(self, layer)

    def merged_weight(self, layer: Any) -> Tensor:
        """W + B·diag(w)·A of an adapted linear layer, [out, in], in the finer of their dtypes and then as W is."""
        weight, down, up = (part.weight for part in (layer.base_layer, *self.maps(layer)))
        dtype = torch.promote_types(weight.dtype, up.dtype)
        if self.weights is not None:
            down, up = self._weighed(layer, down, up)
        # Where autocast is on, what is told where to write is left in the dtype that it has.
        merged = torch.empty_like(weight, dtype=dtype)
        scale = layer.scaling[self.adapter]
        torch.addmm(weight.to(dtype), up.to(dtype), down.to(dtype), alpha=scale, out=merged)
        return merged.to(weight.dtype)

    def _weighed(self, layer: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A [R, in] and B·diag(w) [out, R] of a layer, where w is one for all samples."""
        assert self.weights is not None
        return down, up * self.weights[0].to(up.device)

    def maps(self, layer: Any) -> tuple[Any, Any]:
        """A and B of an adapted layer."""
        return layer.lora_A[self.adapter], layer.lora_B[self.adapter]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.weigh is not None
        timestep = (dict(zip(self._names, args, strict=False)) | kwargs)[self._timestep]
        level = self._levels(torch.as_tensor(timestep).float()).clamp(0.0, 1.0)
        self._set_weights(level)

    def _set_weights(self, noise_level: Tensor) -> None:
        assert self.weigh is not None
        self.weights = self.weigh(noise_level)
        # Training need not wait for the device to tell.
        self.are_shared = self.merges and not torch.is_grad_enabled() and are_alike(self.weights)

    def _hook(self, number: int) -> Any:
        """What weighs the ranks of a layer in its forward."""
        return self._apply

    def _apply(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.weights is not None
        return weigh_ranks(module, output, self.weights)


def adapted_layers(model: nn.Module, adapter: str) -> list[Any]:
    """The layers that have an adapter of that name, in the model's order."""
    return [part for part in model.modules() if adapter in getattr(part, "lora_A", ())]


def weigh_ranks(module: nn.Module, output: Tensor, weights: Tensor) -> Tensor:
    """The output of an adapter's first layer, each sample's ranks times weights [B, R]."""
    weights = weights.to(output.device, output.dtype)
    if not isinstance(module, nn.Linear):  # a convolution: its ranks are channels
        return output * weights.view(*weights.shape, *[1] * (output.ndim - 2))
    return output * weights.view(len(weights), *[1] * (output.ndim - 2), -1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def are_alike(rows: Tensor) -> bool:
    return len(rows) == 1 or bool((rows == rows[:1]).all())


class MergedForward:
    """Stands in for an adapted layer's forward: as one linear layer where that can be, and costs less."""

    def __init__(self, ranks: Ranks, layer: Any) -> None:
        self.ranks = ranks
        self.layer = layer
        self.kept: Tensor | None = None  # a merged weight that was made before; see `MergedWeights`

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept is not None and not (args or kwargs or torch.is_grad_enabled()):
            return F.linear(x, self.kept, self.layer.base_layer.bias)
        if args or kwargs or not (self.can_merge() and self._is_cheaper(x)):
            output: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return output
        return F.linear(x, self.ranks.merged_weight(self.layer), self.layer.base_layer.bias)

    def can_merge(self) -> bool:
        """In sampling: a linear layer in memory, not quantised, without hooks, under this adapter alone."""
        if not (self.ranks.merges and self.ranks.are_shared) or torch.is_grad_enabled():
            return False
        layer, base = self.layer, self.layer.base_layer
        if layer.active_adapters != [self.ranks.adapter] or layer.disable_adapters or layer.merged:
            return False
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base) or type(base) is not nn.Linear:
            return False
        return type(base.weight) is nn.Parameter and base.weight.is_floating_point() and not base.weight.is_meta

    def parameters(self) -> list[dict[str, Any]]:
        """Of the modules whose weights are merged."""
        return [part._parameters for part in (self.layer.base_layer, *self.ranks.maps(self.layer))]

    def state(self) -> tuple[Any, ...]:
        """What else counts: the scale, adapters that are on, hooks. Asked before each forward, hence by dicts."""
        own = vars(self.layer)
        base = vars(own["_modules"]["base_layer"])
        adapters = own["_active_adapter"], own["_disable_adapters"], len(own["merged_adapters"]), self.ranks.merges
        hooks = len(base["_forward_hooks"]), len(base["_forward_pre_hooks"]), "forward" in base
        return own["scaling"][self.ranks.adapter], adapters, hooks

    def _is_cheaper(self, x: Tensor) -> bool:
        """Rows · R · (in + out) multiplications through the maps, or in · out · R to merge them."""
        base: nn.Linear = self.layer.base_layer
        rows = x.numel() // base.in_features
        return rows * (base.in_features + base.out_features) > base.in_features * base.out_features


def linear_layers_of_blocks(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside a model's blocks: attention, MLP, and modulation by the condition.

    Blocks are the sites of the model's description (a U-Net's are its stages), so embedders and the final layer are
    left out. So are the experts of a mixture (HiDream-I1), to which tokens of all samples come together.

    Raises:
        UserError: no family is registered for the model.
    """
    blocks = tuple(f"{site.module}." for site in describe(model).sites)
    linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return [path for path in linear if path.startswith(blocks) and ".experts." not in path]
