"""What the numbers of a config may be, and the values that are given for its fields."""

import math
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stagepatch.core.errors import UserError


def check_numbers(config: object, prefix: str = "", /, **limits: float | tuple[float, float]) -> None:
    """Refuse numbers of a dataclass that are out of range, and any that are not finite or need more than 64 bits.

    Args:
        prefix: of the names, in the message, such as 'training.'.
        limits: by field the least number, or the least and the most; of lists for each in them. None is let through.

    Raises:
        UserError: by name of the field.
    """
    for name, value in vars(config).items():
        limit = limits.get(name, -math.inf)
        low, high = limit if isinstance(limit, tuple) else (limit, math.inf)
        for number in _flat(value):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not abs(number) < 2**63:
                raise UserError(f"{prefix}{name}={value} must be finite, and fit in 64 bits.")
            if not low <= number <= high:
                wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"{prefix}{name}={value} must be {wanted}.")


def check_values(values: Mapping[str, Any], config_class: type, where: str) -> None:
    """Refuse what a dataclass has no field for, and values of other types than its fields have.

    Args:
        values: by field; of a field that is a dataclass itself, a dict of the same kind.
        where: they stand, for the message.

    Raises:
        UserError: by name of the field.
    """
    kinds = get_type_hints(config_class)
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{where} has no key '{name}'. Keys: {', '.join(sorted(kinds))}.")
        kind: Any = kinds[name]
        if is_dataclass(kind) and isinstance(value, dict):
            check_values(value, kind, f"{where}.{name}")  # type: ignore[arg-type]
        elif not _is_of(value, kind):
            raise UserError(f"{where}.{name} is {value!r}: expected {_in_words(kind)}.")


def _is_of(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is_of(each, inner[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _in_words(kind: Any) -> str:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("null" if each is types.NoneType else _in_words(each) for each in inner)
    return f"a list of {_in_words(inner[0])}" if get_origin(kind) is list else kind.__name__


def _flat(value: object) -> list[object]:
    return [each for inner in value for each in _flat(inner)] if isinstance(value, list) else [value]
