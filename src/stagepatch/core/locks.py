"""Locks that the system takes back when the process that holds them ends, however it ends."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from stagepatch.core.errors import UserError
from stagepatch.core.process_state import processes

_PATIENCE = 6.0  # seconds; loading processes of a run that was killed share its lock, and end within five


class InUse(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, refusal: str = "", patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file, made if need be.

    Args:
        refusal: what is said where another process holds it; empty to wait for it.
        patience: seconds before that.

    Raises:
        InUse: another process holds it.
        UserError: the file cannot be made.
    """
    lock = FileLock(path, timeout=patience if refusal else -1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InUse(refusal) from None
    except OSError as error:
        raise UserError(f"Cannot write '{path}': {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Refuse a directory that another launch works in. The processes of this one are alone in it together.

    Raises:
        InUse: another does; every process of this launch raises it.
    """
    said = f"Another process works in '{directory}': wait until it is done, or choose another output_dir."
    state, refused = processes(), False
    with ExitStack() as held:
        if state.is_main_process:
            try:
                held.enter_context(locked(directory / "run.lock", said, _PATIENCE))
            except InUse:
                refused = True
        if any(gather_object([refused])):
            raise InUse(said)
        yield
