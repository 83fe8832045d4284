"""A piece of a study: work in a directory of its own, that is done once, whoever begins it."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from stagepatch.core import check_unchanged, locked, processes, read_json
from stagepatch.training import TrainConfig


class Job(ABC):
    """What a study plans, launches and collects; it can be pickled, and `str` names it.

    Attributes:
        record: file of its directory that says what it is of.
        noun: what it is called in messages.
        directory: its own.
        config: of its training run.
    """

    record: ClassVar[str]
    noun: ClassVar[str]
    directory: Path
    config: TrainConfig

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides its result."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def work(self) -> None:
        """Do what is left to do."""

    def run(self) -> None:
        """`work`, unless another process does; that is waited for."""
        with locked(self.directory / "lock") if processes().is_main_process else contextlib.nullcontext():
            processes().wait_for_everyone()
            if not self.is_done():
                self.work()

    def check_directory(self, defaults: object, ignored: Collection[str]) -> None:
        """Refuse a directory that holds a job of another config; see `check_unchanged`.

        Raises:
            UserError: by name of what differs.
        """
        path, now = self.directory / self.record, self.identity()
        if path.exists():
            record = read_json(path)  # with more in it
            then = {name: record[name] for name in now if name in record}
            found = f"'{self.directory}' holds a {self.noun} of another config"
            way_out = "Give another output_dir, or delete that directory."
            check_unchanged(then, now, found, way_out, defaults, ignored)
