"""A page on a run while it trains: report.html in its directory, whole at any time, read again by the browser."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from stagepatch.training.config import HELD_OUT, HELD_OUT_BASE, TrainingConfig

REPORT_NAME = "report.html"
_MOST_RECORDS = 500  # that are plotted
_LARGEST = 1600  # pixels of a grid's longer side

Records = Sequence[Mapping[str, float]]


class LiveReport:
    """Losses, those on held-out images, the last pictures, the settings, and the time that is left.

    Args:
        directory: of the run.
        config: how often it is written at most, and the last step.
        settings: of the run, as they are shown.
        prompts: of the pictures, if there are some.
    """

    def __init__(self, directory: Path, config: TrainingConfig, settings: str, prompts: Sequence[str] = ()) -> None:
        self.directory, self.path = directory, directory / REPORT_NAME
        self.every, self.steps = config.report_every, config.steps
        self.settings, self.prompts = settings, prompts
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether it was last written, or the run began, long enough ago."""
        return self.every > 0 and time.monotonic() - self._last >= self.every

    def write(self, records: Records, done: int, seconds_left: float) -> None:
        """Write the page of a run that goes on."""
        left = timedelta(seconds=round(seconds_left))
        self._write(records, f"Iteration {done:,} of {self.steps:,}; {left} left.", refresh=max(1, round(self.every)))
        self._last = time.monotonic()

    def close(self, records: Records, done: int, is_stopped: bool) -> None:
        """Write the page of a run that is over, if it has one or if one is due."""
        if self.is_due() or (self.every > 0 and self.path.exists()):
            state = "The run stopped at iteration" if is_stopped else "The run is done: iteration"
            self._write(records, f"{state} {done:,} of {self.steps:,}.", refresh=0)

    def _write(self, records: Records, state: str, refresh: int) -> None:
        from stagepatch import report  # matplotlib is slow to import

        steps = [record for record in records if "loss" in record]
        curves = report.training_curves(steps[:: max(1, len(steps) // _MOST_RECORDS)])
        sections: list[Any] = [
            report.Picture("Training", curves, report.TRAINING_CAPTION),
            *_held_out([record for record in records if f"{HELD_OUT}all" in record]),
            *self._pictures(),
            report.Code("Settings", self.settings),
            report.KeyValues("Environment", report.environment()),
        ]
        lead = f"{state} As of {time.strftime('%Y-%m-%d %H:%M:%S')}."
        report.write_page(self.path, f"Training in {self.directory.name}", lead, sections, refresh)

    def _pictures(self) -> list[Any]:
        from stagepatch import report

        paths = sorted((self.directory / "validation").glob("*.png"))
        if not paths:
            return []
        with Image.open(paths[-1]) as file:
            picture = file.convert("RGB")
        said = f" Captions, in turn: {'; '.join(self.prompts)}." if self.prompts else ""
        steps = f"After {int(paths[-1].stem):,} steps"
        caption = f"{steps}: the base left of the slider, what is learned right of it, from equal noise.{said}"
        grids = report.split_pair(picture)
        for grid in grids:
            grid.thumbnail((_LARGEST, _LARGEST))
        return [report.Comparison("Pictures", *grids, ("base", "learned"), caption)]


def _held_out(records: Records) -> list[Any]:
    """The change of the loss on held-out images, by range of noise levels, and the last losses."""
    from stagepatch import report

    if not records:
        return []
    names = [name.removeprefix(HELD_OUT) for name in records[-1] if name.startswith(HELD_OUT)]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    rows = []
    for name in names:
        for record in records:
            base, learned = record[HELD_OUT_BASE + name], record[HELD_OUT + name]
            curves[name].append((record["iteration"], 100.0 * (learned / base - 1.0)))
        rows.append([name, f"{base:.5g}", f"{learned:.5g}", f"{curves[name][-1][1]:+.2f} %"])
    note = (
        "The loss on images that are not trained on, by noise level (0: image, 1: noise), against the base's. Below "
        "zero is better than the base; whether samples get better, it does not say."
    )
    return [
        report.Picture("Held-out loss", report.metric_curves(curves, "change to the base [%]"), note),
        report.Table("Held-out loss, last", ["noise level", "base", "learned", "change"], rows),
    ]
