"""Which model a patch was made for: its architecture exactly, its weights by a few of them."""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.checkpoints import is_plain
from stagepatch.core import as_json

_SAMPLED = 16  # parameters, of which the first few numbers are kept
_NUMBERS = 4
_ADDED = (".lora_", ".to_qkv.", ".to_kv.", ".to_added_qkv.")
# Says nothing of what a patch needs.
_IGNORED = {"sample_size", "dropout", "attention_dropout", "class_dropout_prob"}


@dataclass(frozen=True)
class Fingerprint:
    """Of a model.

    Args:
        model_id: the directory or Hub id that it was loaded from; '' where it was not.
        architecture: hash of its parameters' names and shapes; '' where they cannot be read (quantized).
        config: its config, to say what differs.
        weights: the first numbers of some of its parameters; none of those that are not in memory, or quantised.
        dtype: the coarsest of those numbers, which bounds how exactly they compare.
    """

    model_id: str = ""
    architecture: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse values of other types, as a broken file may have.

        Raises:
            TypeError: by name of the field.
        """
        for name, default in vars(Fingerprint).items():
            if isinstance(default, str) and name in vars(self) and not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        rows = list(self.weights.values()) if isinstance(self.weights, dict) else [None]
        if not isinstance(self.config, dict) or not all(map(_are_numbers, rows)):
            raise TypeError("config or weights are not by name")


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Adapters that PEFT put on the model are left out, and copies that fused projections made."""
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in _ADDED)
    }
    config: dict[str, Any] = dict(getattr(model, "config", None) or {})
    named = {name: value for name, value in config.items() if not name.startswith("_") and name not in _IGNORED}
    is_readable = all(parameter.is_floating_point() for parameter in parameters.values())
    shapes = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in sorted(parameters.items()))
    matrices = sorted(name for name, parameter in parameters.items() if parameter.ndim > 1)
    chosen = matrices[:: max(1, len(matrices) // _SAMPLED)]
    plain = [name for name in chosen if is_plain(parameters[name]) and not parameters[name].is_meta]
    first = {name: _whole(parameters[name].detach()).flatten()[:_NUMBERS].float().tolist() for name in plain}
    dtypes = [parameters[name].dtype for name in plain] or [next(iter(parameters.values())).dtype]
    return Fingerprint(
        model_id=str(config.get("_name_or_path") or ""),
        architecture=hashlib.sha256(shapes.encode()).hexdigest() if is_readable else "",
        config=as_json({name: value for name, value in named.items() if _is_simple(value)}),
        weights=first,
        dtype=str(max(dtypes, key=_coarseness)).removeprefix("torch."),
    )


def _whole(value: Tensor) -> Tensor:
    """All of a tensor that processes share (DTensor)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 1.0


def _is_simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_simple(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def architecture_differences(made_for: Fingerprint, model: Fingerprint) -> list[str]:
    """What differs, in words; nothing where the architectures are equal or cannot be read."""
    if not made_for.architecture or not model.architecture or made_for.architecture == model.architecture:
        return []
    pairs = [(name, value, model.config.get(name)) for name, value in made_for.config.items()]
    differences = [f"{name} {value} against the model's {other}" for name, value, other in pairs if value != other]
    return differences or ["names or shapes of its parameters"]


def warn_of_other_weights(made_for: Fingerprint, model: Fingerprint) -> None:
    """Warn where a model has the architecture that a patch was trained on, but other weights."""
    dtypes = [getattr(torch, one.dtype, torch.float32) for one in (made_for, model)]
    tolerance = 2.0 * max(map(_coarseness, dtypes))
    for name in (name for name in made_for.weights if name in model.weights):
        ours, theirs = torch.tensor(made_for.weights[name]), torch.tensor(model.weights[name])
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=tolerance, atol=1e-6):
            trained_on = f" ('{made_for.model_id}')" if made_for.model_id else ""
            warnings.warn(
                f"The patch was trained on other weights of this architecture{trained_on}: '{name}' differs. It may "
                f"help less, or harm; compare with and without it.",
                stacklevel=4,
            )
            return
