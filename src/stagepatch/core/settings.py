"""What runs that go on from one another must share, as JSON, whichever version of this package wrote it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from stagepatch.core.errors import UserError


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file gives them back; dataclasses become objects, tuples lists."""
    values: dict[str, Any] = json.loads(json.dumps(settings, default=asdict))
    return values


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], defaults: object = None, ignored: Collection[str] = ()
) -> dict[str, str]:
    """What differs between the settings of a file and those of today.

    Args:
        then: from the file. What it lacks did not exist when it was written, and had its default.
        now: its values may be dataclasses, which know their defaults.
        defaults: a dataclass, or an object, whose attributes are the defaults of other values.
        ignored: names that may differ, at any depth.

    Returns:
        By dotted name, such as "training.steps": "was 5, is 6".
    """
    former = {
        name: getattr(defaults, name)
        for name, value in now.items()
        if hasattr(defaults, name) and not isinstance(value, dict)
    }
    former |= {
        name: type(value)() for name, value in now.items() if is_dataclass(value) and not isinstance(value, type)
    }
    before, after = {**_flat(as_json(former)), **_flat(then)}, _flat(as_json(now))
    names = [name for name in sorted({*before, *after}) if not {*name.split(".")} & {*ignored}]
    return {
        name: f"was {_short(before.get(name))}, is {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    }


def check_unchanged(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    found: str,
    way_out: str,
    defaults: object = None,
    ignored: Collection[str] = (),
) -> None:
    """Refuse to go on from a file of other settings; see `differences`.

    Args:
        found: what the file is, for the message.
        way_out: a sentence.

    Raises:
        UserError: by name of what differs, the first four.
    """
    changes = differences(then, now, defaults, ignored)
    if changes:
        named = ", ".join(f"{name} {change}" for name, change in list(changes.items())[:4])
        raise UserError(f"{found} ({named}). {way_out}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
