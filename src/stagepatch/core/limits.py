"""What the numbers of a config may be."""

import math

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


def _flat(value: object) -> list[object]:
    return [each for inner in value for each in _flat(inner)] if isinstance(value, list) else [value]
