"""Where the evaluations of a search are kept: Optuna's journal file, or a database."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import Connection, Engine, event

from stagepatch.core import UserError

_HEARTBEAT, _GRACE = 30, 120  # seconds, of a database


@contextlib.contextmanager
def open_storage(storage: str) -> Iterator[tuple[BaseStorage, Workers | None]]:
    """A storage, and who works on it, if it is a journal: a database sees that by heartbeats.

    Args:
        storage: a database's URL, or a journal file.

    Raises:
        UserError: it cannot be opened.
    """
    if "://" in storage:
        yield _open_database(storage), None
    else:
        journal = JournalStorage(_open_journal(Path(storage)))
        with contextlib.closing(Workers(Path(f"{storage}.workers"))) as workers:
            yield journal, workers


class _JournalLock:
    """Of a journal. Optuna's own are files that a killed process leaves behind, which then are waited for."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        """Wait for it; of a line that was not wholly written, as on a full disk or by a kill, nothing is kept."""
        self._lock.acquire()
        if self._path.stat().st_size:
            with open(self._path, "rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let others have it."""
        self._lock.release()


class _Journal(JournalFileBackend):
    """A journal that says when it cannot be written."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise UserError(
                f"Cannot write the search's journal: {error}. Free space, and start again: what is evaluated is kept."
            ) from error


def _open_journal(path: Path) -> _Journal:
    """A journal that is one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines()[: content.count(b"\n")]:
            json.loads(line)["op_code"]
        lock: Any = _JournalLock(path)  # Optuna exports no class for it
        return _Journal(str(path), lock)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{path}' is no journal of a search that can be used: {error}. Give another.") from error


def _open_database(url: str) -> RDBStorage:
    """A database; that another process makes the tables at the same moment is waited for."""
    for seconds in (0.5, 2.0, None):
        try:
            storage = RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)
        except Exception as error:  # as many kinds as there are databases
            if seconds is None or isinstance(error, ImportError):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"The storage of the search cannot be opened: {reason}") from error
            time.sleep(seconds)
        else:
            if storage.engine.dialect.name == "sqlite":
                _lock_at_once(storage.engine)
            return storage
    raise AssertionError


def _lock_at_once(engine: Engine) -> None:
    """SQLite locks nothing when a row is read to be changed, so two processes could begin one trial."""

    def on_connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    engine.dispose()


class Workers:
    """Who works on a journal. Each process locks a file of its own, and the system unlocks it when the process ends.

    Args:
        directory: of those files.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.own = uuid.uuid4().hex
        self._directory = directory
        self._lock = FileLock(directory / self.own)
        self._lock.acquire()

    def is_gone(self, worker: str) -> bool:
        """Whether a process has ended."""
        try:
            with FileLock(self._directory / worker, timeout=0):
                (self._directory / worker).unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    def close(self) -> None:
        """This process ends its work."""
        self._lock.release()
        (self._directory / self.own).unlink(missing_ok=True)
