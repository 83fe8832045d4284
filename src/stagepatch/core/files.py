"""Files that are whole or absent: written to a temporary name, flushed, renamed; read with plain errors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagepatch.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
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
    write_atomically(path, lambda temporary: _write_bytes(temporary, text.encode()))


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


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`write_atomically` for a safetensors file. Tensors may live on any device."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(contiguous, {"format": "pt", **(metadata or {})})
    write_atomically(path, lambda temporary: _write_bytes(temporary, content))


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, or it does not hold a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No such file: '{path}'.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read '{path}' as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds {type(value).__name__}, not a JSON object.")
    return value


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or it is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"No such file: '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' is not a whole safetensors file ({error}). It may be truncated, or of another format: "
            f"fetch or write it again."
        ) from error
