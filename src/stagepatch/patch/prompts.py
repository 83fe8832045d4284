"""What a patch learns, and what it computes in a forward: prompts, gate, and their mixture at each site."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families import Backbone, Extent, Site, check_found
from stagepatch.families.base import Grid
from stagepatch.patch import balance, mixture
from stagepatch.patch.config import PatchConfig
from stagepatch.patch.fingerprint import Fingerprint
from stagepatch.patch.gate import AttentionGate, LearnedKeysGate, LinearGate
from stagepatch.patch.resample import resample, resample_tokens


@dataclass
class Mixture:
    """The gate's answer in the last forward, each tensor [L, B, M] for M choices: on the gate's reference grid."""

    logits: Tensor
    noisy_logits: Tensor
    noise_std: Tensor | None
    weights: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # A copy of a model starts without a forward behind it; tensors of a graph cannot be copied.
        return None


class MixtureOfPrompts(nn.Module):
    """Prompts and gate (DMP, arXiv 2405.17825, Eq. 3), apart from the model that they are put on; see `Patch`."""

    def __init__(self, config: PatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.scale = 1.0
        self.enabled = True
        self.last: Mixture | None = None
        self.sources: Tensor | None = None
        self.extent: Extent | None = None
        self.observed_rows = 0
        self.fingerprint = Fingerprint()
        self.facts: dict[str, str] = {}
        sites = backbone.sites
        self.grids = [_at_most(site.grid, config.grid) for site in sites]
        self.gate_grid = _at_most(backbone.grid, config.grid)
        self.num_choices = math.prod(self.gate_grid) if config.position == "add" else config.num_prompts
        if config.num_experts > 1:
            self.num_choices = config.num_experts
        self.prompts = nn.ParameterList(
            _initial_prompts(config, site, grid) for site, grid in zip(sites, self.grids, strict=True)
        )
        attentions = [site.attention for site in sites if site.attention and config.is_gated_prepending]
        self.head_gates = nn.ParameterList(nn.Parameter(torch.zeros(attention.heads)) for attention in attentions)
        self.gate = self._new_gate()

    @property
    def condition(self) -> str | None:
        """Which embedding the gate sees."""
        return self.config.condition

    def _new_gate(self) -> LinearGate | AttentionGate | None:
        config, sites, channels = self.config, self.backbone.sites, self.backbone.condition_channels
        indices = [site.index for site in sites]
        if config.gate == "none":
            return None
        if config.gate != "attention":
            gate_class = LearnedKeysGate if config.gate == "learned_keys" else LinearGate
            return gate_class(config, channels, self.num_choices, indices)
        widths = {site.channels for site in sites}
        if len(widths) > 1 or any(site.layout == "map" for site in sites):
            raise UserError(
                f"gate='attention' needs sites of tokens, all of one width; {self.backbone.model_class} has "
                f"{', '.join(map(str, sorted(widths)))} channels. Take gate='linear'."
            )
        return AttentionGate(config, channels, widths.pop(), indices)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """What is learned, by its names in a patch's file: `prompts.{site}`, `gate.weight`, `gate.bias`, …"""
        tensors = {}
        for name, parameter in self.named_parameters():
            kind, _, rest = name.partition(".")
            tensors[f"{kind}.{self.backbone.sites[int(rest)].name}" if rest.isdecimal() else name] = parameter
        return tensors

    def fill(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy tensors, by their names in the file, into this patch.

        Raises:
            UserError: names or shapes other than this patch's in the source.
        """
        own = self.named_tensors()
        odd = sorted(set(own) ^ set(tensors))
        if odd:
            raise UserError(f"'{source}' does not hold this patch: {', '.join(odd[:4])} missing or not expected.")
        for name, parameter in own.items():
            found, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            if found != expected:
                raise UserError(f"'{source}' does not hold this patch: {name} is {found}, expected {expected}.")
            if not tensors[name].is_floating_point():
                raise UserError(f"'{source}' does not hold this patch: {name} is {tensors[name].dtype}.")
            parameter.data.copy_(tensors[name])

    def num_parameters(self) -> int:
        """Learned numbers in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def observe(self, condition: Tensor) -> None:
        """Compute the weights of all sites for a condition embedding [B, C], once per forward."""
        if self.backbone.is_found:
            self.observed_rows = len(condition)
        if self.prompts[0].device != condition.device:
            self.to(condition.device)  # the model was moved, or is offloaded and computes elsewhere
        if self.gate is None:
            return
        with mixture.no_autocast(condition):
            condition = condition.to(self.prompts[0].dtype)
            if isinstance(self.gate, AttentionGate):
                self.sources = self.gate.sources(condition)
                return
            logits = self.gate(condition)
            noise_std = self.gate.noise_std(condition) if self.training else None
            noisy_logits = logits if noise_std is None else logits + torch.randn_like(logits) * noise_std
            self.last = Mixture(logits, noisy_logits, noise_std, self._weigh(noisy_logits))

    def _weigh(self, logits: Tensor) -> Tensor:
        if self.config.selection == "soft":
            return mixture.soft_weights(logits, self.config.normalization)
        # On another grid than the gate's own, the same share is chosen.
        k = max(1, round(self.top_k * logits.shape[-1] / self.num_choices))
        return mixture.hard_weights(logits, k, self.config.hard_weight or "one")

    @property
    def top_k(self) -> int:
        """Choices that hard selection takes."""
        top_k = self.config.top_k
        return min(self.num_choices, int(top_k) if top_k >= 1 else max(1, round(top_k * self.num_choices)))

    def enter(self, position: int, hidden_states: Tensor) -> Tensor:
        """Hidden states with the mixture of the position-th site added, or prepended.

        Args:
            hidden_states: as the site's layout says.
        """
        site = self.backbone.sites[position]
        if self.backbone.is_found:
            grid = site.grid if self.extent is None else self.extent.grid
            check_found(self.backbone.model_class, site, hidden_states, grid, self.observed_rows)
        if self.config.position == "add":
            if site.layout == "sequence":
                return self._add(position, site, hidden_states.transpose(0, 1)).transpose(0, 1).contiguous()
            return self._add(position, site, hidden_states)
        return torch.cat([self.mixture_like(hidden_states, position, self.scale), hidden_states], dim=1)

    def mixture_like(self, hidden_states: Tensor, position: int, scale: float = 1.0) -> Tensor:
        """The mixture of the position-th site times a scale, [B, N, D], in the hidden states' dtype."""
        weights = None if self.last is None else self.last.weights[position]
        with mixture.no_autocast(hidden_states):
            mixed = mixture.mix(self.prompts[position], weights) * scale
        return mixed.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)

    def _add(self, position: int, site: Site, hidden_states: Tensor) -> Tensor:
        is_map = site.layout == "map"
        grid = tuple(hidden_states.shape[2:]) if is_map else self._token_grid(site, hidden_states)
        with mixture.no_autocast(hidden_states):
            prompts = self._prompts_on(position, grid)
            if isinstance(self.gate, AttentionGate) and self.sources is not None:
                prompts = self.gate.attend(prompts, self.sources[position])
            weights = self._weights_on(position, grid)
        # Of weights that sum to one, a token's share stays what it is at the reference size.
        scale = self.scale * (math.prod(grid) / site.num_tokens if self._sums_to_one() else 1.0)
        if is_map or hidden_states.shape[1] == math.prod(grid):
            return mixture.add_mixture(hidden_states, prompts, weights, scale)
        return self._add_among(site, hidden_states, prompts, weights, scale)

    def _sums_to_one(self) -> bool:
        """Whether a site's weights over its tokens do."""
        config = self.config
        is_selected_by_ones = config.selection == "hard" and config.hard_weight == "one"
        is_over_tokens = isinstance(self.gate, LinearGate) and config.num_experts == 1
        return is_over_tokens and config.normalization == "softmax" and not is_selected_by_ones

    def _add_among(
        self, site: Site, hidden_states: Tensor, prompts: Tensor, weights: Tensor | None, scale: float
    ) -> Tensor:
        """Add to the image's tokens, which share the sequence with others."""
        count = prompts.shape[-2]
        if site.image_tokens == "after_text":
            if self.extent is None or self.extent.text_lengths is None:
                raise UserError(
                    f"Site '{site.name}' needs the lengths of the texts, which its description did not read."
                )
            mixed = mixture.mix(prompts, weights).expand(hidden_states.shape[0], -1, -1) * scale
            return mixture.add_after_text(hidden_states, mixed, self.extent.text_lengths)
        first = 0 if site.image_tokens == "first" else hidden_states.shape[1] - count
        before, image, after = hidden_states.split([first, count, hidden_states.shape[1] - first - count], dim=1)
        return torch.cat([before, mixture.add_mixture(image, prompts, weights, scale), after], dim=1)

    def _token_grid(self, site: Site, hidden_states: Tensor) -> Grid:
        grid = site.grid if self.extent is None else self.extent.grid
        if math.prod(grid) > hidden_states.shape[1] or hidden_states.shape[2] != site.channels:
            raise UserError(
                f"Site '{site.name}' got {tuple(hidden_states.shape[1:])} tokens and channels, where an image of "
                f"{' × '.join(map(str, grid))} tokens and {site.channels} channels was expected."
            )
        return grid

    def _prompts_on(self, position: int, grid: Grid) -> Tensor:
        prompts = self.prompts[position]
        if self.backbone.sites[position].layout == "map":
            return resample(prompts, grid)
        return resample_tokens(prompts, self.grids[position], grid)

    def _weights_on(self, position: int, grid: Grid) -> Tensor | None:
        """[B, N] over the positions of a grid, or [B, K] over sets."""
        if self.last is None:
            return None
        if grid == self.gate_grid or self.config.num_experts > 1:
            return self.last.weights[position]
        logits = resample(self.last.noisy_logits[position].unflatten(-1, self.gate_grid), grid)
        return self._weigh(logits.flatten(-len(grid)))

    def balance_terms(self) -> dict[str, Tensor]:
        """The balance losses of the last forward, unweighted: `importance` and `load`, scalars.

        Raises:
            UserError: no forward has run since the patch was attached.
        """
        if not isinstance(self.gate, LinearGate):
            return {}
        if self.last is None:
            raise UserError("Balance losses need a forward of the patched model first.")
        last, config = self.last, self.config
        is_unbiased = config.importance_variance == "unbiased"
        importance = balance.importance_loss_unbiased if is_unbiased else balance.importance_loss
        return {"importance": importance(last.weights), "load": self._load(last)}

    def _load(self, last: Mixture) -> Tensor:
        kind = self.config.load_loss
        if kind == "indicator":
            return balance.load_indicator(last.noisy_logits)
        if kind == "surrogate":
            return balance.load_surrogate(last.noisy_logits)
        if kind == "smooth" and last.noise_std is not None and self.top_k < self.num_choices:
            return balance.load_smooth(last.logits, last.noisy_logits, last.noise_std, self.top_k)
        return last.logits.new_zeros(())

    def balance_loss(self, terms: dict[str, Tensor] | None = None) -> Tensor:
        """importance_weight · importance + load_weight · load of the last forward, a scalar (Eq. 11–13).

        Args:
            terms: `balance_terms()`, where they are there already.
        """
        terms = self.balance_terms() if terms is None else terms
        if not terms:
            return torch.zeros((), device=self.prompts[0].device)
        return self.config.importance_weight * terms["importance"] + self.config.load_weight * terms["load"]

    def gate_entropy(self) -> Tensor:
        """Mean entropy [nats] of the last forward's weights; log M where all choices weigh the same."""
        if self.last is None:
            return torch.zeros((), device=self.prompts[0].device)
        return mixture.gate_entropy(self.last.weights.detach()).mean()


def _at_most(grid: Grid, limit: list[int] | None) -> Grid:
    return grid if limit is None else tuple(min(pair) for pair in zip(grid, limit, strict=True))


def _initial_prompts(config: PatchConfig, site: Site, grid: Grid) -> nn.Parameter:
    """[N, D], or for feature maps [D, H, W]; for K sets with K in front."""
    shape = (site.channels, *grid) if site.layout == "map" else (math.prod(grid), site.channels)
    if config.position == "prepend":
        shape = (config.num_prompts, site.channels)
    if config.num_experts > 1:
        shape = (config.num_experts, *shape)
    if config.initialization == "zero":
        return nn.Parameter(torch.zeros(shape))
    return nn.Parameter(torch.randn(shape) * config.initialization_std)
