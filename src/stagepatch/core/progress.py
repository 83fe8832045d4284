"""Progress bars; where the output is no terminal, a plain line now and then."""

import time
from datetime import timedelta
from typing import Any

from rich import progress as rich_progress

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(**options: Any) -> rich_progress.Progress:
    """A bar with count, rate and time left."""
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[status]}"),
    )
    return _Progress(*columns, **options)


class _Progress(rich_progress.Progress):
    """rich's, which shows nothing until the end where the output is a file or a pipe."""

    _last_line = 0.0

    def start(self) -> None:
        self._last_line = time.monotonic()
        super().start()

    def advance(self, *args: Any, **kwargs: Any) -> None:
        super().advance(*args, **kwargs)
        self._print_line()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self._print_line()

    def _print_line(self) -> None:
        due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if self.disable or self.console.is_terminal or not due:
            return
        self._last_line = time.monotonic()
        parts = [time.strftime("%H:%M:%S")]
        for task in self.tasks:
            left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
            total = "" if task.total is None else f"/{task.total:g}"
            status = f", {task.fields['status']}" if task.fields.get("status") else ""
            parts.append(f"{task.description} {task.completed:g}{total}{status}{left}")
        print("  ".join(parts), flush=True)
