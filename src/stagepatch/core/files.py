"""Files that are whole or absent: written to a temporary name, flushed, renamed; read with plain errors."""

import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stagepatch.core.errors import UserError, as_user_error

if sys.platform != "win32":
    import fcntl


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, rename it to `path`, and flush the rename.

    Raises:
        UserError: the file cannot be written (no space, no permission); `path` keeps its former content.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            _flush_directory(path.parent)
    except OSError as error:
        raise UserError(
            f"Cannot write '{path}': {error.strerror or error}. Its former content, if any, is intact; free "
            f"space or choose another directory, and start again."
        ) from error


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A file beside `path`, locked while this process lives: those of processes that were killed go first.

    Where there are no locks (Windows, some file systems), what killed processes left behind stays.
    """
    if sys.platform == "win32":
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
            yield Path(directory) / path.name
        return
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError), open(unfinished, "rb") as file:  # one that is written now cannot be locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unfinished.unlink()
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # before it was locked, another process took it for unfinished
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to write into that becomes `path` at the end; one that is there already is written into as it is."""
    if path.exists():
        yield path
        return
    temporary = path.parent / f".{path.name}.unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    yield temporary
    with as_user_error(f"Cannot write '{path}'", OSError):
        temporary.rename(path)
        _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    """Without this a power cut may take back a rename that later files rely on. Not every file system can."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def copy_file(source: str | Path, path: str | Path) -> None:
    """`write_atomically` of what another file holds; into a directory, by the same name."""
    path = Path(path)
    write_atomically(
        path / Path(source).name if path.is_dir() else path, lambda temporary: shutil.copyfile(source, temporary)
    )


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
