"""A run's records: log.jsonl, trackers, the page, and a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from stagepatch.core import append_text, as_user_error, progress_bar, write_text
from stagepatch.training.config import HELD_OUT, HELD_OUT_BASE
from stagepatch.training.live_report import LiveReport
from stagepatch.training.trackers import log_picture

LOG_NAME = "log.jsonl"
_TRACKER = "A tracker of the run cannot write"


def read_log(directory: Path) -> list[dict[str, float]]:
    """The records of a run, oldest first; a last line cut short by a kill is left out."""
    path = directory / LOG_NAME
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class RunLog:
    """Writes a run's records; does nothing where `active` is False (processes other than the first).

    Args:
        directory: of the run.
        start: iteration that the run goes on from; later records, of work to be repeated, are dropped.
        stop: last iteration.
        trackers: what else records and pictures go to; ended with the log.
        active: whether this process writes.
        progress: whether it also shows a bar.
        report: a page on the run, kept up to date.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        stop: int,
        trackers: Sequence[Any],
        active: bool,
        progress: bool,
        report: LiveReport | None = None,
    ) -> None:
        self.directory = directory
        self.active = active
        self.start, self.done, self.stop = start, start, stop
        self.trackers = trackers
        self.report = report if active else None
        self.progress = progress_bar(disable=not (active and progress))
        self.task = self.progress.add_task("training", total=stop, completed=start, status="")
        self.status: dict[str, str] = {}
        self.since = time.monotonic()
        if active:
            kept = [json.dumps(record) for record in read_log(directory) if record["iteration"] <= start]
            write_text(directory / LOG_NAME, "".join(line + "\n" for line in kept))

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.progress.stop()
        with as_user_error(_TRACKER, OSError):
            for tracker in self.trackers:
                tracker.finish()
        if self.report is not None:
            self.report.close(read_log(self.directory), self.done, is_stopped=error is not None)

    def advance(self) -> None:
        """One iteration is done."""
        self.done += 1
        self.progress.advance(self.task)

    def write(self, record: dict[str, float]) -> None:
        """Append a record, which has `iteration`."""
        shown = {"loss": "loss", f"{HELD_OUT}all": "held out", f"{HELD_OUT_BASE}all": "of the base"}
        self.status |= {name: f"{text} {record[name]:.4f}" for name, text in shown.items() if name in record}
        self.progress.update(self.task, status=", ".join(self.status.values()))
        if not self.active:
            return
        append_text(self.directory / LOG_NAME, json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name != "iteration"}
        with as_user_error(_TRACKER, OSError):
            for tracker in self.trackers:
                tracker.log(values, step=int(record["iteration"]))
        if self.report is not None and self.report.is_due():
            left = (time.monotonic() - self.since) / max(1, self.done - self.start) * (self.stop - self.done)
            self.report.write(read_log(self.directory), self.done, left)

    def show(self, name: str, picture: Image.Image, done: int) -> None:
        """Give a picture to the trackers that take one."""
        with as_user_error(_TRACKER, OSError):
            for tracker in self.trackers:
                log_picture(tracker, name, picture, done)
