"""A run's records: log.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stagepatch.core import append_text, progress_bar, write_text

LOG_NAME = "log.jsonl"


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
        tensorboard: also write TensorBoard events.
        active: whether this process writes.
        progress: whether it also shows a bar.
    """

    def __init__(
        self, directory: Path, start: int, stop: int, tensorboard: bool, active: bool, progress: bool
    ) -> None:
        self.directory = directory
        self.active = active
        self.progress = progress_bar(disable=not (active and progress))
        self.task = self.progress.add_task("training", total=stop, completed=start, status="")
        self.writer: Any = None
        if not active:
            return
        kept = [json.dumps(record) for record in read_log(directory) if record["iteration"] <= start]
        write_text(directory / LOG_NAME, "".join(line + "\n" for line in kept))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def advance(self) -> None:
        """One iteration is done."""
        self.progress.advance(self.task)

    def write(self, record: dict[str, float]) -> None:
        """Append a record, which has `iteration`."""
        self.progress.update(self.task, status=f"loss {record['loss']:.4f}")
        if not self.active:
            return
        append_text(self.directory / LOG_NAME, json.dumps(record) + "\n")
        if self.writer is not None:
            for name, value in record.items():
                if name != "iteration":
                    self.writer.add_scalar(name, value, int(record["iteration"]))
