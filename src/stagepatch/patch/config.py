"""Every choice of the paper (DMP, arXiv 2405.17825), and those of its released code."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from stagepatch.core.errors import UserError

# What a field left at None takes, by preset (PAPERS: the paper's text, the released code).
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "condition": "t",
        "sites": "all",
        "hard_weight": "one",
        "gate_noise": False,
        "gate_learning_rate_factor": 1.0,
        "importance_variance": "population",
        "load_loss": "surrogate",
    },
    "released": {
        "condition": "t+c",
        "sites": 12,
        "hard_weight": "renormalized",
        "gate_noise": True,
        "gate_learning_rate_factor": 10.0,
        "importance_variance": "unbiased",
        "load_loss": "none",
    },
}


@dataclass
class PatchConfig:
    """What a patch learns and how its prompts are mixed. A field left out (null) follows the preset.

    Args:
        preset: 'paper' (arXiv 2405.17825) or 'released' (the authors' code, which differs).
        position: 'add' prompts to the hidden states (Eq. 3) or 'prepend' them as tokens (Table 4d).
        num_prompts: prompts per site for 'prepend' (Table 4d: 50); 'add' has one per token, or per cell of `grid`.
        prepending: 'gated' attends to the prompts apart, behind a gate per head that starts at zero (as in
            LLaMA-Adapter, arXiv 2303.16199), so the model starts unchanged; 'plain' puts them among the tokens
            (Table 4d), which changes it from the start. paper, released: they add; Table 4d is plain.
        sample_size: size of the model's input [latent pixels] at which its grids are counted: a side, [height,
            width], or for video [frames, height, width]. By default the model's own. Other sizes work too.
        grid: most prompts along [height, width] (for video [frames, height, width]) at each site; fewer than
            tokens are spread over them. By default one prompt per token (paper).
        num_experts: prompt sets K per site; K > 1 mixes whole sets over time by a softmax over the K (paper: 1).
        sites: 'all' blocks, 'first', the first 'half', the first n (a number), or a list of site names (Fig. 4). A
            U-Net has 'stages' (its 'all') and 'attention' sites. paper: all; released: 12.
        initialization: of the prompts: 'zero' (paper) or 'normal', which changes the model from the start; by
            default zero, but normal for gated prepending, whose gate at zero would keep zero prompts at zero.
        initialization_std: standard deviation of 'normal'.
        gate: 'linear' (Eq. 3), 'attention' (Table 4a) or 'none', which is plain prompt tuning (Eq. 2).
        block_index: append the block's index to the gate's input (Table 4c: on).
        condition: the gate's input: the timestep embedding 't', or 't+c' with that of the class or pooled text
            (Table 9); t alone in models that embed neither. paper: t; released: t+c.
        selection: 'soft' weighs all prompts, 'hard' takes the top k (Table 4b: soft).
        top_k: for 'hard': a count, or a share below 1 (Table 4b: 192 of 256).
        hard_weight: weight of the prompts chosen by 'hard': 'one' each, or softmax 'renormalized' over them.
            paper: one; released: renormalized.
        normalization: of soft weights: 'softmax' over the prompts (Eq. 3), so that each weighs about 1/N; 'mean_one',
            the same times N; 'sigmoid', 2·sigmoid of each logit on its own. At a zero gate the latter two weigh all
            prompts 1, so that their step at a learning rate is prompt tuning's.
        matched_step: prompts without a gate learn at 1/N of the rate: the step that a uniform softmax gives them.
        gate_noise: learned noise on the logits in training (Shazeer et al., arXiv 1701.06538, Eq. 4).
            paper: off; released: on.
        gate_initialization: 'zero' or 'normal'; by default zero for K = 1 (paper), normal for K > 1, since equal
            sets under an equal gate would never part.
        gate_learning_rate_factor: the gate's learning rate over the prompts'. paper: 1; released: 10.
        importance_weight: weight of the importance loss (Eq. 11, 12; Table 4e: 1).
        importance_variance: 'population' per sample over the prompts (Eq. 12), or 'unbiased' over batch and prompts
            together, a term a block. paper: population; released: unbiased.
        load_weight: weight of the load loss (Eq. 13; Table 4e: 1).
        load_loss: 'surrogate' max(0, −logit), zero where the indicator is; 'indicator' as printed (no gradient);
            'smooth' (arXiv 1701.06538, Eq. 8–11; needs hard selection and noise); 'none'.
            paper: surrogate; released: none.
    """

    preset: Literal["paper", "released"] = "paper"
    position: Literal["add", "prepend"] = "add"
    num_prompts: int = 50
    prepending: Literal["gated", "plain"] = "gated"
    sample_size: int | list[int] | None = None
    grid: list[int] | None = None
    num_experts: int = 1
    sites: Literal["all", "first", "half", "stages", "attention"] | int | list[str] | None = None
    initialization: Literal["zero", "normal"] | None = None
    initialization_std: float = 0.02
    gate: Literal["linear", "attention", "none"] = "linear"
    block_index: bool = True
    condition: Literal["t", "t+c"] | None = None
    selection: Literal["soft", "hard"] = "soft"
    top_k: float = 0.75
    hard_weight: Literal["one", "renormalized"] | None = None
    normalization: Literal["softmax", "mean_one", "sigmoid"] = "softmax"
    matched_step: bool = False
    gate_noise: bool | None = None
    gate_initialization: Literal["zero", "normal"] | None = None
    gate_learning_rate_factor: float | None = None
    importance_weight: float = 1.0
    importance_variance: Literal["population", "unbiased"] | None = None
    load_weight: float = 1.0
    load_loss: Literal["surrogate", "indicator", "smooth", "none"] | None = None

    def __post_init__(self) -> None:
        if self.preset not in tuple(_PRESETS):
            raise UserError(f"preset={self.preset!r} is none of {', '.join(_PRESETS)}.")
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        _check_types(self)
        if self.gate_initialization is None:
            self.gate_initialization = "zero" if self.num_experts == 1 else "normal"
        if self.initialization is None:
            gated = self.position == "prepend" and self.prepending == "gated"
            self.initialization = "normal" if gated else "zero"
        self._check()

    def _check(self) -> None:
        _check_choices(self)
        if self.num_experts > 1 and self.gate == "none":
            raise UserError(f"num_experts={self.num_experts} needs a gate to mix them: set gate to 'linear'.")
        if self.grid is not None and not (isinstance(self.grid, list) and _are_counts(self.grid)):
            raise UserError(f"grid={self.grid!r} must be a list of whole numbers of at least 1, such as [16, 16].")
        size = self.sample_size if isinstance(self.sample_size, list) else [self.sample_size]
        if size != [None] and not _are_counts(size):
            raise UserError(f"sample_size={self.sample_size!r} must be whole numbers of at least 1.")
        if self.top_k <= 0 or (self.top_k >= 1 and self.top_k != int(self.top_k)):
            raise UserError(f"top_k={self.top_k} is neither a count (1, 2, …) nor a share between 0 and 1.")
        if self.normalization != "softmax" and (self.selection == "hard" or self.num_experts > 1):
            raise UserError(
                f"normalization='{self.normalization}' is defined for selection='soft' with num_experts=1."
            )
        if self.load_loss == "smooth" and not (self.selection == "hard" and self.gate_noise):
            raise UserError("load_loss='smooth' is defined for selection='hard' with gate_noise=true.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PatchConfig:
        """From a `config.json`.

        Raises:
            UserError: an unknown key or choice.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"Unknown key in a patch's config: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
            )
        return cls(**values)


_CHOICES = {
    "position": ("add", "prepend"),
    "prepending": ("gated", "plain"),
    "initialization": ("zero", "normal"),
    "gate": ("linear", "attention", "none"),
    "condition": ("t", "t+c"),
    "selection": ("soft", "hard"),
    "hard_weight": ("one", "renormalized"),
    "gate_initialization": ("zero", "normal"),
    "normalization": ("softmax", "mean_one", "sigmoid"),
    "importance_variance": ("population", "unbiased"),
    "load_loss": ("surrogate", "indicator", "smooth", "none"),
}


def _check_choices(config: PatchConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"{name}={getattr(config, name)!r} is none of {', '.join(choices)}.")


_COUNTS = ("num_prompts", "num_experts")
_AMOUNTS = ("initialization_std", "top_k", "gate_learning_rate_factor", "importance_weight", "load_weight")
_FLAGS = ("block_index", "gate_noise", "matched_step")


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 1 for value in values)


def _check_types(config: PatchConfig) -> None:
    for name in _COUNTS:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1.")
    for name in _AMOUNTS:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UserError(f"{name}={value!r} must be a finite number of at least 0.")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise UserError(f"{name}={getattr(config, name)!r} is neither true nor false.")
    if not _is_choice_of_sites(config.sites):
        raise UserError(
            f"sites={config.sites!r} is none of all, first, half, stages, attention, a number of at least 1, or a "
            f"list of names."
        )


def _is_choice_of_sites(sites: Any) -> bool:
    if isinstance(sites, list):
        return bool(sites) and all(isinstance(name, str) for name in sites)
    return sites in ("all", "first", "half", "stages", "attention") or (type(sites) is int and sites >= 1)
