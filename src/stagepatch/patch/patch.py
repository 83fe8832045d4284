"""Patch: the module that owns what is learned, and nothing of the model it is attached to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core.errors import UserError
from stagepatch.families import Backbone, Extent, Site, describe, find_denoiser
from stagepatch.families.base import Grid
from stagepatch.patch import balance, mixture
from stagepatch.patch.attachment import Attachment, patches_on
from stagepatch.patch.config import PatchConfig
from stagepatch.patch.fingerprint import Fingerprint, architecture_differences, fingerprint, warn_of_other_weights
from stagepatch.patch.gate import AttentionGate, LinearGate
from stagepatch.patch.resample import resample, resample_tokens
from stagepatch.patch.sites import check_same_sites, select_sites


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


class Patch(nn.Module):
    """Prompts and gate for a frozen denoiser (DMP, arXiv 2405.17825, Eq. 3).

    Made by `Patch.create(model, config)` or `Patch.from_pretrained(directory)`, put on by `attach`.

    Args:
        config: choices of the method.
        backbone: description of the model it is for, with the sites that the patch takes and no others.

    Attributes:
        scale: factor on the prompts, 1 as trained. With position 'add', 0 is the base model.
        enabled: False leaves the model as if the patch were detached.
        fingerprint: of the model that it was made for.
        facts: how it was trained, in words, for its model card.
    """

    def __init__(self, config: PatchConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.scale = 1.0
        self.enabled = True
        self.last: Mixture | None = None
        self.extent: Extent | None = None
        self.fingerprint = Fingerprint()
        self.facts: dict[str, str] = {}
        sites = self.backbone.sites
        self.grids = [_at_most(site.grid, config.grid) for site in sites]
        self.gate_grid = _at_most(backbone.grid, config.grid)
        is_added = config.position == "add"
        self.num_choices = math.prod(self.gate_grid) if is_added else config.num_prompts
        if config.num_experts > 1:
            self.num_choices = config.num_experts
        shapes = [
            _prompt_shape(config, site.channels, grid, site.layout)
            for site, grid in zip(sites, self.grids, strict=True)
        ]
        self.prompts = nn.ParameterList(_initial_prompts(config, shape) for shape in shapes)
        self.is_gated_prepending = not is_added and config.prepending == "gated"
        heads = [site.attention.heads if site.attention else 0 for site in sites] if self.is_gated_prepending else []
        self.head_gates = nn.ParameterList(nn.Parameter(torch.zeros(count)) for count in heads)
        self.gate = None if config.gate == "none" else self._make_gate()

    def _make_gate(self) -> LinearGate:
        config = self.config
        gate_class = AttentionGate if config.gate == "attention" else LinearGate
        return gate_class(
            self.backbone.condition_channels,
            self.num_choices,
            [site.index for site in self.backbone.sites],
            config.block_index,
            bool(config.gate_noise),
            config.gate_initialization or "zero",
        )

    @classmethod
    def create(cls, model: Any, config: PatchConfig | None = None, component: str = "") -> Patch:
        """A fresh patch for a model or pipeline, on the model's device. The model is not touched.

        Args:
            component: the denoiser's name in a pipeline that has several.

        Raises:
            UserError: an unknown model class, or a choice that the model cannot take.
        """
        denoiser = find_denoiser(model, component)
        config = config or PatchConfig()
        patch = cls(config, select_sites(describe(denoiser, config.sample_size), config))
        patch.fingerprint = fingerprint(denoiser)
        is_offloaded = any(hasattr(module, "_hf_hook") for module in denoiser.modules())
        return patch if is_offloaded else patch.to(next(denoiser.parameters()).device)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, token: str | None = None) -> Patch:
        """A patch that `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: a directory, or a Hub id such as 'name/patch'.
            revision: branch, tag or commit on the Hub.
            token: for a private repository.

        Raises:
            UserError: missing, truncated or foreign files.
        """
        from stagepatch.patch.storage import load_patch

        return load_patch(source, revision, token)

    @classmethod
    def from_released(cls, checkpoint: Any) -> Patch:
        """A patch out of a checkpoint of the authors' released code, which also holds the DiT.

        Args:
            checkpoint: a file, or a state dict with `prompt_embeddings` [L, N, D], `gate.weight`, `gate.bias` and
                optionally `w_noise`.

        Raises:
            UserError: no such file or keys.
        """
        from stagepatch.patch.storage import load_released

        return load_released(checkpoint)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and a model card, each whole or not at all."""
        from stagepatch.patch.storage import save_patch

        save_patch(self, directory)

    def push_to_hub(
        self, repo_id: str, private: bool = False, token: str | None = None, message: str = "Upload patch"
    ) -> str:
        """Put what `save_pretrained` writes into a Hub repository, made if need be; returns the commit's URL.

        Raises:
            UserError: no such namespace, no permission, or the Hub cannot be reached.
        """
        from stagepatch.patch.storage import push_patch

        return push_patch(self, repo_id, private, token, message)

    def attach(self, target: Any, component: str = "") -> Attachment:
        """Put the patch on a model, or on the denoiser of a diffusers pipeline; it follows to the model's device.

        Attaching and detaching make a compiled model compile again; to compare with and without, set `enabled`.
        Several patches on one model add up, each with its own scale.

        Args:
            component: the denoiser's name in a pipeline that has several.

        Returns:
            A handle with `detach()`; as a context manager it detaches at the end.

        Raises:
            UserError: the patch is for another model, or is on this one already.

        Warns:
            UserWarning: the model has the architecture, but other weights than the patch was trained on.
        """
        model = find_denoiser(target, component)
        backbone = select_sites(describe(model, self.config.sample_size), self.config)
        on = fingerprint(model)
        check_same_sites(self.backbone, backbone, architecture_differences(self.fingerprint, on))
        warn_of_other_weights(self.fingerprint, on)
        if any(patch is self for patch in patches_on(model)):
            raise UserError("This patch is attached to that model already: detach it first.")
        device = next(model.parameters()).device
        if device.type != "meta":  # an offloaded model: then the patch follows the hidden states
            self.to(device)
        return Attachment(self, model, backbone)

    def observe(self, condition: Tensor) -> None:
        """Compute the weights of all sites for a condition embedding [B, C], once per forward."""
        if self.prompts[0].device != condition.device:
            self.to(condition.device)  # the model was moved, or is offloaded and computes elsewhere
        if self.gate is None:
            return
        with mixture.no_autocast(condition):
            condition = condition.to(self.prompts[0].dtype)
            logits = self.gate(condition)
            noisy_logits, noise_std = logits, None
            if self.training and self.config.gate_noise:
                noise_std = self.gate.noise_std(condition)
            if noise_std is not None:
                noisy_logits = logits + torch.randn_like(logits) * noise_std
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
            hidden_states: [B, N, D], or a map [B, D, H, W].
        """
        if self.config.position == "add":
            return self._add(position, self.backbone.sites[position], hidden_states)
        weights = None if self.last is None else self.last.weights[position]
        with mixture.no_autocast(hidden_states):
            mixed = mixture.mix(self.prompts[position], weights) * self.scale
        mixed = mixed.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        return torch.cat([mixed, hidden_states], dim=1)

    def _add(self, position: int, site: Site, hidden_states: Tensor) -> Tensor:
        is_map = site.layout == "map"
        grid = tuple(hidden_states.shape[2:]) if is_map else self._token_grid(site, hidden_states)
        with mixture.no_autocast(hidden_states):
            prompts = self._prompts_on(position, grid)
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
        is_over_tokens = self.gate is not None and config.num_experts == 1
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
        if self.gate is None:
            return {}
        if self.last is None:
            raise UserError("Balance losses need a forward of the patched model first.")
        last, config = self.last, self.config
        if config.importance_variance == "unbiased":
            importance = balance.importance_loss_unbiased(last.weights)
        else:
            importance = balance.importance_loss(last.weights)
        return {"importance": importance, "load": self._load(last)}

    def _load(self, last: Mixture) -> Tensor:
        kind = self.config.load_loss
        if kind == "indicator":
            return balance.load_indicator(last.noisy_logits)
        if kind == "surrogate":
            return balance.load_surrogate(last.noisy_logits)
        if kind == "smooth" and last.noise_std is not None and self.top_k < self.num_choices:
            return balance.load_smooth(last.logits, last.noisy_logits, last.noise_std, self.top_k)
        return last.logits.new_zeros(())

    def balance_loss(self) -> Tensor:
        """importance_weight · importance + load_weight · load of the last forward, a scalar (Eq. 11–13)."""
        terms = self.balance_terms()
        if not terms:
            return torch.zeros((), device=self.prompts[0].device)
        return self.config.importance_weight * terms["importance"] + self.config.load_weight * terms["load"]

    def gate_entropy(self) -> Tensor:
        """Mean entropy [nats] of the last forward's weights; log M where all choices weigh the same."""
        if self.last is None:
            return torch.zeros((), device=self.prompts[0].device)
        weights = self.last.weights.detach()
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        entropy: Tensor = torch.special.entr(shares)
        return entropy.sum(dim=-1).mean()

    def num_parameters(self) -> int:
        """Learned numbers in all."""
        return sum(parameter.numel() for parameter in self.parameters())


def _at_most(grid: Grid, limit: list[int] | None) -> Grid:
    return grid if limit is None else tuple(min(pair) for pair in zip(grid, limit, strict=True))


def _prompt_shape(config: PatchConfig, channels: int, grid: Grid, layout: str) -> tuple[int, ...]:
    """[N, D], or for feature maps [D, H, W]; for K sets with K in front."""
    sets = () if config.num_experts == 1 else (config.num_experts,)
    if config.position == "prepend":
        return (*sets, config.num_prompts, channels)
    return (*sets, channels, *grid) if layout == "map" else (*sets, math.prod(grid), channels)


def _initial_prompts(config: PatchConfig, shape: tuple[int, ...]) -> nn.Parameter:
    if config.initialization == "zero":
        return nn.Parameter(torch.zeros(shape))
    return nn.Parameter(torch.randn(shape) * config.initialization_std)
