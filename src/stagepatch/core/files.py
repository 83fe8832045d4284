"""Files that are whole or absent: written to a temporary name, flushed, renamed; read with plain errors."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagepatch.core.errors import UserError, as_user_error


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then flush it to disk and rename it to `path`.

    Raises:
        UserError: the file cannot be written (no space, no permission); `path` keeps its former content.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise UserError(
            f"Cannot write '{path}': {error.strerror or error}. Its former content, if any, is intact; free "
            f"space or choose another directory, and start again."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def append_text(path: str | Path, text: str) -> None:
    """Add to a file that grows line by line.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"Cannot write '{path}': {error.strerror or error}. Free space and start again.") from error


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomically` for JSON, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_exists(path: str | Path, noun: str = "file") -> None:
    """Refuse a file that is not there.

    Raises:
        UserError: it is not.
    """
    if not Path(path).exists():
        raise UserError(f"No such {noun}: '{path}'.")


def read_yaml(path: str | Path, noun: str = "file") -> Any:
    """What a YAML file holds.

    Args:
        noun: what it is called in messages.

    Raises:
        UserError: no such file, or no YAML.
    """
    import yaml

    check_exists(path, noun)
    with as_user_error(f"Cannot read the {noun} '{path}'", OSError, ValueError, yaml.YAMLError):
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or it does not hold a JSON object.
    """
    check_exists(path)
    with as_user_error(f"Cannot read '{path}' as JSON", OSError, ValueError):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds {type(value).__name__}, not a JSON object.")
    return value
