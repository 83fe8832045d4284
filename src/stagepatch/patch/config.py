"""Every choice of the paper (DMP, arXiv 2405.17825), and those of its released code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stagepatch.core import UserError, check_numbers

# What a field left at None takes: in the paper's text, and in the released code (PAPERS).
_BY_PRESET: dict[str, tuple[Any, Any]] = {
    "condition": (None, "t+c"),  # None: as the model is
    "sites": ("all", 12),
    "hard_weight": ("one", "renormalized"),
    "gate_noise": (False, True),
    "gate_learning_rate_factor": (1.0, 10.0),
    "importance_variance": ("population", "unbiased"),
    "load_loss": ("surrogate", "none"),
}
SiteGroup = Literal["all", "first", "half", "stages", "attention"]


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
            width], or for video [frames, height, width]. By default the model's own, or that of the videos that it is
            trained on. Other sizes work too.
        grid: most prompts along [height, width] (for video [frames, height, width]) at each site; fewer than
            tokens are spread over them. By default one prompt per token (paper).
        num_experts: prompt sets K per site; K > 1 mixes whole sets over time by a softmax over the K (paper: 1).
        sites: 'all' blocks, 'first', the first 'half', the first n (a number), or a list of site names (Fig. 4). A
            U-Net has 'stages' (its 'all') and 'attention' sites. paper: all; released: 12.
        initialization: of the prompts: 'zero' (paper) or 'normal', which changes the model from the start; by
            default zero, but normal for gated prepending, whose gate at zero would keep zero prompts at zero.
        initialization_std: standard deviation of 'normal'.
        gate: 'linear' (Eq. 3); 'attention' of the prompts to timestep and block (a reading of Table 4a; it has no
            weights over prompts and so no balance losses); 'learned_keys', ours: a query of the timestep, a key a
            prompt; or 'none', which is plain prompt tuning (Eq. 2).
        block_index: append the block's index to the gate's input (Table 4c: on).
        condition: the gate's input: the timestep embedding 't', or 't+c' with that of the class or pooled text
            (Table 9); t alone in models that embed neither, to which 't+text', an option of ours, gives the mean of
            the text's tokens beside t, for any model that attends to text (such as Stable Diffusion 1.x). paper:
            t+c in text-to-image models, t in others; released: t+c.
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
        importance_weight: weight of the importance loss (Eq. 12, 13; Table 4e: 1).
        importance_variance: 'population' per sample over the prompts (Eq. 13), or 'unbiased' over batch and prompts
            together, a term a block. paper: population; released: unbiased.
        load_weight: weight of the load loss (Eq. 11; Table 4e: 1).
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
    sites: SiteGroup | int | list[str] | None = None
    initialization: Literal["zero", "normal"] | None = None
    initialization_std: float = 0.02
    gate: Literal["linear", "attention", "learned_keys", "none"] = "linear"
    block_index: bool = True
    condition: Literal["t", "t+c", "t+text"] | None = None
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
        for name, (paper, released) in _BY_PRESET.items():
            if getattr(self, name) is None:
                setattr(self, name, paper if self.preset == "paper" else released)
        if self.gate_initialization is None:
            self.gate_initialization = "zero" if self.num_experts == 1 else "normal"
        if self.initialization is None:
            self.initialization = "normal" if self.is_gated_prepending else "zero"
        for name, kind in _field_kinds().items():
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
            _check_field(name, getattr(self, name), kind)
        check_numbers(self)
        self._check_sizes()
        self._check_combinations()

    @property
    def is_gated_prepending(self) -> bool:
        """Whether prompts are attended to apart, each head behind a gate."""
        return self.position == "prepend" and self.prepending == "gated"

    def _check_sizes(self) -> None:
        if self.grid is not None and not (isinstance(self.grid, list) and _are_counts(self.grid)):
            raise UserError(f"grid={self.grid!r} must be a list of whole numbers of at least 1, such as [16, 16].")
        size = self.sample_size if isinstance(self.sample_size, list) else [self.sample_size]
        if self.sample_size is not None and not _are_counts(size):
            raise UserError(f"sample_size={self.sample_size!r} must be whole numbers of at least 1.")
        are_names = isinstance(self.sites, list) and self.sites and all(isinstance(name, str) for name in self.sites)
        if not are_names and self.sites not in get_args(SiteGroup) and not _are_counts([self.sites]):
            raise UserError(
                f"sites={self.sites!r} is none of {', '.join(get_args(SiteGroup))}, a number of at least 1, or a list "
                f"of names."
            )
        if self.top_k <= 0 or (self.top_k >= 1 and self.top_k != int(self.top_k)):
            raise UserError(f"top_k={self.top_k} is neither a count (1, 2, …) nor a share between 0 and 1.")

    def _check_combinations(self) -> None:
        if self.num_experts > 1 and self.gate == "none":
            raise UserError(f"num_experts={self.num_experts} needs a gate to mix them: set gate to 'linear'.")
        if self.normalization != "softmax" and (self.selection == "hard" or self.num_experts > 1):
            raise UserError(
                f"normalization='{self.normalization}' is defined for selection='soft' with num_experts=1."
            )
        if self.gate == "attention":
            self._check_attention()
        if self.load_loss == "smooth" and not (self.selection == "hard" and self.gate_noise):
            raise UserError("load_loss='smooth' is defined for selection='hard' with gate_noise=true.")

    def _check_attention(self) -> None:
        needed = {
            "position": "add",
            "num_experts": 1,
            "block_index": True,
            "selection": "soft",
            "normalization": "softmax",
            "gate_noise": False,
        }
        odd = {name: value for name, value in needed.items() if getattr(self, name) != value}
        if odd:
            raise UserError(
                "gate='attention' has no weights over prompts, and its second key is the block's index. It needs "
                + ", ".join(f"{name}={value!r}" for name, value in odd.items())
                + "; gate='learned_keys' takes all choices."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PatchConfig:
        """From a `config.json`.

        Raises:
            UserError: an unknown key or choice.
        """
        fields = _field_kinds()
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise UserError(
                f"Unknown key in a patch's config: {', '.join(unknown)}. Known: {', '.join(sorted(fields))}."
            )
        return cls(**values)


@cache
def _field_kinds() -> dict[str, tuple[Any, ...]]:
    """The kinds of value that each field's annotation names, without None."""
    hints = get_type_hints(PatchConfig)
    return {name: tuple(set(get_args(hint | None)) - {NoneType}) for name, hint in hints.items()}


def _check_field(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    """Refuse what is not of a field's one kind: a choice, a count, an amount or a flag."""
    if len(kinds) > 1 or (name == "condition" and value is None):
        return
    if get_origin(kinds[0]) is Literal and value not in get_args(kinds[0]):
        raise UserError(f"{name}={value!r} is none of {', '.join(get_args(kinds[0]))}.")
    if kinds[0] is int and not _are_counts([value]):
        raise UserError(f"{name}={value!r} must be a whole number of at least 1.")
    if kinds[0] is float and (type(value) not in (int, float) or not 0 <= value < math.inf):
        raise UserError(f"{name}={value!r} must be a finite number of at least 0.")
    if kinds[0] is bool and not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is neither true nor false.")


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 1 for value in values)
