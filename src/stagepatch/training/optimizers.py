"""Optimizers by name, each the class of its own library; what to give them is in docs/optimizers.md."""

import importlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, as_user_error
from stagepatch.training.config import TrainingConfig

_LOGGER = logging.getLogger("stagepatch")


@dataclass(frozen=True)
class _Kind:
    """Where an optimizer is, what to install for it, and what it is given unless it is told otherwise."""

    module: str
    name: str
    package: str
    defaults: dict[str, Any] = field(default_factory=dict)


_KINDS = {
    "adamw": _Kind("torch.optim", "AdamW", "torch"),
    "adamw_8bit": _Kind("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    # Scaled by their own size, parameters that start at zero would hardly move.
    "adafactor": _Kind(
        "transformers.optimization", "Adafactor", "transformers", {"scale_parameter": False, "relative_step": False}
    ),
    "prodigy": _Kind("prodigyopt", "Prodigy", "prodigyopt"),
    "schedule_free": _Kind("schedulefree", "AdamWScheduleFree", "schedulefree"),
    # So that one learning rate serves the matrices and what AdamW takes (arXiv 2502.16982).
    "muon": _Kind("torch.optim", "Muon", "torch>=2.9", {"adjust_lr_fn": "match_rms_adamw"}),
}


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one.

    Args:
        parts: their groups are this one's, in order.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One of each."""
        for part in self.parts:
            part.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Groups and states are the same objects here and in the parts."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names.

    It is given learning rate, decay and betas as far as its class takes them, and `optimizer_options`.

    Args:
        groups: `params` and `lr`, and what else is a group's own.

    Raises:
        UserError: its library is missing, an option that it has not, or one that cannot be; several learning rates
            where it finds one; or an average of one that averages itself.
    """
    kind = _KINDS[config.optimizer]
    optimizer_class = _load(kind, config.optimizer)
    taken = set(inspect.signature(optimizer_class).parameters) - {"params"}
    betas = (config.adam_beta1, config.adam_beta2)
    shared = {"lr": config.learning_rate, "betas": betas, "weight_decay": config.weight_decay}
    if unknown := sorted({*config.optimizer_options} - (taken - {*shared})):
        raise UserError(
            f"training.optimizer_options: {kind.name} has no {', '.join(unknown)}, or it is an option of training. "
            f"It has: {', '.join(sorted(taken - {*shared}))}."
        )
    options = {**kind.defaults, **config.optimizer_options}
    is_own_rate = config.optimizer == "prodigy" or bool(options.get("relative_step"))
    _check_rates(groups, config, is_own_rate)
    if options.get("relative_step"):
        shared["lr"] = None
    given = {name: value for name, value in shared.items() if name in taken} | options
    with as_user_error(f"training.optimizer='{config.optimizer}' cannot be had", ValueError, TypeError):
        if config.optimizer == "muon":
            adamw = {"betas": betas, "weight_decay": config.weight_decay}
            return _of_matrices(groups, optimizer_class, given, adamw)
        optimizer: torch.optim.Optimizer = optimizer_class(groups, **given)
    if config.optimizer == "schedule_free":
        if config.ema_decay or config.posthoc_ema:
            raise UserError(
                "training.optimizer='schedule_free' averages what it trains itself: leave out ema_decay and "
                "posthoc_ema."
            )
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _load(kind: _Kind, name: str) -> Any:
    try:
        return getattr(importlib.import_module(kind.module), kind.name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"training.optimizer='{name}' needs {kind.package} ({error}): pip install '{kind.package}', or "
            f"'stagepatch[optimizers]' for all of them."
        ) from error


def _check_rates(groups: list[dict[str, Any]], config: TrainingConfig, is_own_rate: bool) -> None:
    if is_own_rate and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            f"training.optimizer='{config.optimizer}' finds one learning rate for all that trains, and here a gate or "
            f"the losses' balance has another: set gate_learning_rate_factor to 1, or choose another optimizer."
        )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        _LOGGER.warning(
            "Prodigy multiplies the rate that it finds by training.learning_rate=%g: give 1.", config.learning_rate
        )


def _of_matrices(
    groups: list[dict[str, Any]], matrix_class: Any, options: dict[str, Any], adamw: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of matrices for those, and AdamW for all else."""
    parts = []
    for is_matrix in (True, False):
        chosen = [[each for each in group["params"] if (each.ndim == 2) == is_matrix] for group in groups]
        own = [{**group, "params": params} for group, params in zip(groups, chosen, strict=True) if params]
        if own:
            parts.append(matrix_class(own, **options) if is_matrix else torch.optim.AdamW(own, **adamw))
    return Together(parts)


def learning_rate_of(optimizer: torch.optim.Optimizer) -> float:
    """That of its first group; of Prodigy, times what it has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


@torch.no_grad()
def own_average(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """What a schedule-free optimizer has learned, the average of where it was; others keep none.

    The parameters, which are where its gradients are taken, stay the same to the bit.
    """
    if not hasattr(optimizer, "eval"):
        return None
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer.train()  # type: ignore[attr-defined]
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.copy_(value)
    return average


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor | float]:
    """All that it keeps from step to step, by name: '3.exp_avg' of the fourth parameter, 'groups.0.d' of the first
    group."""
    saved = optimizer.state_dict()
    groups = {str(index): group for index, group in enumerate(saved["param_groups"])}
    values = _flat({**saved["state"], "groups": groups})
    return {name: value for name, value in values.items() if isinstance(value, Tensor | bool | int | float)}


def restore_state(optimizer: torch.optim.Optimizer, values: dict[str, Any]) -> None:
    """Put back what `state_of` gave, on an optimizer of the same parameters and options.

    Raises:
        ValueError: a name that it does not give; of other odd ones, what they come to.
    """
    saved = optimizer.state_dict()
    state: dict[Any, Any] = {"groups": dict(enumerate(saved["param_groups"]))}
    for name, value in values.items():
        *path, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
        if not path:
            raise ValueError(f"'{name}' is of no parameter")
        holder = state
        for part in path:
            holder = holder.setdefault(part, {})
        holder[last] = value
    groups = list(state.pop("groups").values())
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
