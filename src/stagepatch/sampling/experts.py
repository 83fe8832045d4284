"""Several denoisers by range of timesteps: DeMe before merging (arXiv 2410.06664), eDiff-I (arXiv 2211.01324)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, as_user_error
from stagepatch.families import find_denoiser, input_dtype, learns_sigma, num_classes
from stagepatch.families.registry import family_of
from stagepatch.methods import MergedWeights
from stagepatch.sampling.config import SamplingConfig
from stagepatch.sampling.fusion import SideBySide
from stagepatch.sampling.stand_in import StandIn, check_free

BASE = "base"
_TEXT = ("cross_attention_dim", "joint_attention_dim", "caption_channels", "cap_feat_dim", "text_dim")


@dataclass(frozen=True)
class ExpertRange:
    """The denoiser of timesteps start ≤ t < end.

    Args:
        start, end: in training timesteps 0…T, from the image's end.
        denoiser: patched or not; None for the model that the experts are attached to. Out of a file that is read and
            not yet loaded, an `ExpertSource`.
        name: for messages.
    """

    start: float
    end: float
    denoiser: Any = None
    name: str = BASE


@dataclass(eq=False)
class Experts:
    """Denoisers and their ranges; all stay in memory, so that going from one to the next costs nothing.

    Args:
        ranges: from 0 on, without gap, overlapping by `fuse` alone, in any order. The last takes all beyond it.
        timesteps: of the sampler, from noise to image, where these are fixed too.
        scheduler: the sampler that goes with `timesteps`; '' leaves it open.
        fuse: 'maxfusion' lets ranges overlap, two at a time: their denoisers, of the same blocks, run side by side and
            their features are mixed (`SideBySide`).

    Raises:
        UserError: no ranges, an empty one, a gap, an overlap, or another `fuse`.
    """

    ranges: Sequence[ExpertRange]
    timesteps: Sequence[float] | None = None
    scheduler: str = ""
    fuse: str = ""
    stretches: list[tuple[float, list[ExpertRange]]] = field(init=False)

    def __post_init__(self) -> None:
        self.ranges = sorted(self.ranges, key=lambda expert: (expert.start, expert.end))
        if not self.ranges:
            raise UserError("There are no experts: give at least one range.")
        for start, end in ((expert.start, expert.end) for expert in self.ranges):
            if start >= end:
                raise UserError(f"The range from {start:g} to {end:g} is empty: `from` must be less than `to`.")
        if self.fuse not in ("", "maxfusion"):
            raise UserError(f"Features are not mixed by '{self.fuse}': `fuse` is 'maxfusion', or left out.")
        borders = sorted({0.0, *(border for expert in self.ranges for border in (expert.start, expert.end))})
        self.stretches = []
        for start, end in itertools.pairwise(borders):
            here = [expert for expert in self.ranges if expert.start <= start and end <= expert.end]
            if not here:
                raise UserError(f"No expert is there for timesteps {start:g} to {end:g}: leave no gap.")
            if start < 0 or len(here) > (2 if self.fuse else 1):
                number = "More than two" if self.fuse else "Two"
                raise UserError(
                    f"{number} experts are there for timesteps {start:g} to {end:g}, or one starts below 0."
                )
            self.stretches.append((start, here))

    @classmethod
    def at_steps(cls, steps: Sequence[tuple[float, Any, str]], total: float, scheduler: str = "") -> Experts:
        """A denoiser for each step of a sampler; a timestep between two belongs to the nearer.

        Args:
            steps: timestep, denoiser and name, from noise to image.
            total: T.

        Raises:
            UserError: no steps, or timesteps that do not fall.
        """
        timesteps = [timestep for timestep, _, _ in steps]
        if not steps or any(after >= before for before, after in itertools.pairwise(timesteps)):
            raise UserError(
                f"The steps' timesteps are {timesteps}: give at least one, each lower than the one before."
            )
        between = [(before + after) / 2 for before, after in itertools.pairwise(timesteps)]
        borders = itertools.pairwise([total, *between, 0.0])
        ranges = [
            ExpertRange(start, end, denoiser, name)
            for (end, start), (_, denoiser, name) in zip(borders, steps, strict=True)
        ]
        return cls(ranges, timesteps, scheduler)

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """A sampling config with the sampler and the number of steps that the experts fix."""
        if self.timesteps is None:
            return config
        return replace(config, scheduler=self.scheduler or config.scheduler, num_inference_steps=len(self.timesteps))

    def attach(self, target: Any, component: str = "") -> AttachedExperts:
        """Let calls of a model, or of a pipeline's denoiser, go to the expert of their timestep.

        The experts follow to the device of what they are called with, and are put in eval mode.

        Args:
            component: the denoiser's name in a pipeline that has several.

        Returns:
            A handle with `detach()`; as a context manager it detaches at the end.

        Raises:
            UserError: an expert of other inputs or outputs, or a model that has experts already.
        """
        model = find_denoiser(target, component)
        check_free(model)
        for expert in self.ranges:
            if expert.denoiser is not None and expert.denoiser is not model:
                with as_user_error(f"The expert '{expert.name}'", UserError):
                    check_fits(model, expert.denoiser)
                expert.denoiser.eval()
        return AttachedExperts(self, model)


class AttachedExperts(StandIn):
    """Handle of attached experts; see `StandIn`."""

    noun = "experts"

    def __init__(self, experts: Experts, model: nn.Module) -> None:
        self._starts = [start for start, _ in experts.stretches]
        # A model that is there twice is there once: what it would be mixed with is itself.
        self._denoisers = [
            list(dict.fromkeys(expert.denoiser or model for expert in here)) for _, here in experts.stretches
        ]
        self._side_by_side = [SideBySide(each) if len(each) > 1 else None for each in self._denoisers]
        # Of LoRAs: those of the range that is sampled in are merged once, and dropped when another's turn comes.
        self._merged = MergedWeights()
        super().__init__(model)
        self.experts = experts
        self._levels = family_of(type(model)).sample_levels
        self._takes_whole_batch = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        timestep = self.timestep_of(args, kwargs)
        # Without a timestep the model says itself what it misses.
        if not self._takes_whole_batch or timestep is None:
            return self._forward(*args, **kwargs)
        chosen = self._choose(timestep)
        if len(set(chosen)) == 1:
            here = self._denoisers[chosen[0]]
            self._merged.turn_to(here[0] if len(here) == 1 else None)
            return self._call(chosen[0], self._forward, args, kwargs)
        outputs, order = [], []
        for number in sorted(set(chosen)):
            rows = [row for row, other in enumerate(chosen) if other == number]
            own_args = tuple(_take(value, rows, len(chosen), "an argument") for value in args)
            own_kwargs = {name: _take(value, rows, len(chosen), name) for name, value in kwargs.items()}
            outputs.append(self._call(number, self._call_model, own_args, own_kwargs))
            order += rows
        return _join(outputs, order)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _choose(self, timestep: Any) -> list[int]:
        """The number of each sample's stretch; of one for all where one timestep is for all."""
        levels = self._levels(torch.as_tensor(timestep).detach().cpu().double())
        # Rounded, since float32 loses some digits where a model takes timesteps divided by 1000.
        timesteps = (levels * 1000.0).round(decimals=3).tolist()
        numbers = {value: max(0, bisect.bisect_right(self._starts, value) - 1) for value in set(timesteps)}
        return [numbers[value] for value in timesteps]

    def _call(self, number: int, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of a range's denoiser, or of two together; `own` is how the model itself is called."""
        side_by_side = self._side_by_side[number]
        calls = [partial(self._answer, denoiser, own, args, kwargs) for denoiser in self._denoisers[number]]
        return side_by_side(calls) if side_by_side else calls[0]()

    def _answer(
        self, denoiser: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if denoiser is self._model:
            return own(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if tensors and next(denoiser.parameters()).device != tensors[0].device:
            denoiser.to(tensors[0].device)  # the model was moved, or is offloaded and computes elsewhere
        if torch.compiler.is_compiling():
            return denoiser(*args, **kwargs)
        with self._merged.used_by(denoiser):
            return denoiser(*args, **kwargs)

    def detach(self) -> None:
        self._merged.turn_to(None)
        super().detach()

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        """The model on a part of the batch, with its hooks, which have seen the whole batch."""
        self._takes_whole_batch = False
        try:
            return self._model(*args, **kwargs)
        finally:
            self._takes_whole_batch = True


def experts_on(model: nn.Module) -> Experts | None:
    """The experts attached to a model."""
    return model.forward.experts if isinstance(model.forward, AttachedExperts) else None


def _take(value: Any, rows: list[int], batch: int, name: str) -> Any:
    """Some samples' share of an argument: rows of tensors and lists; what is one for all stays."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {key: _take(part, rows, batch, f"{name}['{key}']") for key, part in value.items()}
    if isinstance(value, Tensor) and (value.ndim == 0 or len(value) in (1, batch)):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, list) and len(value) == batch:
        return [value[row] for row in rows]
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UserError(
        f"A batch of {batch} samples is of several experts, and {name} ({shape}) cannot be split among them: call the "
        f"model with samples of one range of timesteps."
    )


def _join(outputs: list[Any], order: list[int]) -> Any:
    """The outputs of parts of a batch as one; `order` has the row of each."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(outputs)[torch.tensor(order, device=first.device).argsort()]
    if isinstance(first, list):
        rows = [row for output in outputs for row in output]
        return [rows[order.index(number)] for number in range(len(rows))]
    if isinstance(first, dict):  # diffusers' outputs are
        return type(first)(**{name: _join([output[name] for output in outputs], order) for name in first})
    return tuple(_join(list(parts), order) for parts in zip(*outputs, strict=True))


def check_fits(model: nn.Module, denoiser: nn.Module) -> None:
    """See that an expert can be called as the model is.

    Raises:
        UserError: it cannot, and why.
    """
    if family_of(type(model)).timestep_range != family_of(type(denoiser)).timestep_range:
        raise UserError(
            f"it is a {type(denoiser).__name__}, which counts time otherwise than the base, a {type(model).__name__}."
        )
    own, base = _facts(denoiser), _facts(model)
    odd = [fact for fact in base if None not in (base[fact], own[fact]) and base[fact] != own[fact]]
    if odd:
        raise UserError(
            f"it does not fit the base: its {odd[0]} is {own[odd[0]]}, the base's {base[odd[0]]}. Experts must take "
            f"and give what the base does."
        )


def _facts(model: nn.Module) -> dict[str, Any]:
    """Of a model's inputs and outputs, in words."""
    config: Any = model.config
    channels = config[family_of(type(model)).channels]
    size = config.get("sample_size")
    return {
        "number of input channels": channels,
        "sample size": (size, size) if isinstance(size, int) else size and tuple(size),
        "number of output channels": config.get("out_channels") or channels * (2 if learns_sigma(model) else 1),
        "number of classes": num_classes(model),
        "conditioning": config.get("conditioning"),
        "width of text embeddings": next((config[key] for key in _TEXT if config.get(key)), None),
        "dtype": input_dtype(model),
    }
