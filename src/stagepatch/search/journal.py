"""What a search has found so far, in a file that is whole after every evaluation."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from stagepatch.checkpoints.loading import find_model
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, write_json
from stagepatch.core.settings import as_json, check_unchanged
from stagepatch.search.model_schedule import NONE, Choices
from stagepatch.search.schedule_config import ScheduleConfig


class Journal:
    """The evaluations of a search; those of a former start are there again.

    Args:
        path: of the file; it is written at once.
        settings: what a search that goes on must share.
        names: of the models, by number.

    Attributes:
        known: each schedule's value of the metric, in the order of the evaluations.

    Raises:
        UserError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], names: list[str]) -> None:
        self.path = path
        self.settings = settings
        self.names = names
        self.known: dict[Choices, float] = {}
        self.seconds: list[float] = []
        if path.exists():
            self._read()
        self._write()

    def add(self, choices: Choices, value: float, seconds: float) -> None:
        """Keep an evaluation.

        Args:
            seconds: per image, predicted of the costs.
        """
        self.known[choices] = value
        self.seconds.append(seconds)
        self._write()

    def _read(self) -> None:
        saved = read_json(self.path)
        former = saved.get("settings")
        if not isinstance(former, dict):
            raise UserError(
                f"'{self.path}' is not of a search for a schedule: move it away, or choose another output_dir."
            )
        found = f"'{self.path}' is of a search with other settings"
        way_out = "Go on with the former settings, or choose another output_dir."
        check_unchanged(former, self.settings, found, way_out, ScheduleConfig())
        numbers = {name: number for number, name in enumerate(self.names)} | {None: NONE}
        for evaluation in saved.get("evaluations", []):
            value = evaluation["value"]
            choices = tuple(numbers[name] for name in evaluation["schedule"])
            self.known[choices] = math.nan if value is None else value
            self.seconds.append(evaluation["seconds"])

    def _write(self) -> None:
        evaluations = [
            {
                "schedule": [None if choice == NONE else self.names[choice] for choice in choices],
                "value": value if math.isfinite(value) else None,
                "seconds": seconds,
            }
            for (choices, value), seconds in zip(self.known.items(), self.seconds, strict=True)
        ]
        write_json(self.path, {"settings": as_json(self.settings), "evaluations": evaluations})


def weights_digest(source: str) -> str:
    """SHA-256 of the weights in a directory, a Hub id's or a bundled model's too."""
    directory = Path(source) if Path(source).is_dir() else find_model(source)
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.safetensors")):
        digest.update(str(path.relative_to(directory)).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
