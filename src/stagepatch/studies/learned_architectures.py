"""The architectures that `decouple --prune_budget` learns: once, for all stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stagepatch.core import as_json, processes, read_tensors, write_json, write_tensors
from stagepatch.diffusion import TimestepSampler
from stagepatch.models import Kept
from stagepatch.studies.decouple_config import DecoupleConfig
from stagepatch.studies.decouple_pruning import learn_architectures
from stagepatch.studies.job import Job
from stagepatch.training import Run, TrainConfig

_FILE = "architectures.safetensors"
_PARTS = ("blocks", "heads", "channels")


@dataclass
class LearnedArchitectures(Job):
    """What stays of a model in each range. What was killed is learned from the start, to the same.

    Args:
        config: gives model, data, batch size and seed.
        study: of all stages.
        ranges: of the stages.
    """

    config: TrainConfig
    study: DecoupleConfig
    ranges: list[TimestepSampler]
    record = "architectures.json"
    noun = "set of architectures"

    @property
    def directory(self) -> Path:  # type: ignore[override]
        """Its own."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return "the architectures"

    def identity(self) -> dict[str, Any]:
        own = {name: getattr(self.study, name) for name in ("prune_budget", "prune_steps", "prune_threshold")}
        run = {name: getattr(self.config, name) for name in ("model", "dtype", "weighting", "data", "training")}
        return {**run, **own, "ranges": [[each.first, each.stop] for each in self.ranges]}

    def is_done(self) -> bool:
        return (self.directory / self.record).exists()

    def work(self) -> None:
        study = self.study
        kept = learn_architectures(
            Run(self.config), self.ranges, study.prune_budget, study.prune_steps, study.prune_threshold
        )
        if processes().is_main_process:
            tensors = {f"{number}.{part}": getattr(each, part) for number, each in enumerate(kept) for part in _PARTS}
            write_tensors(self.directory / _FILE, {name: value.to(torch.uint8) for name, value in tensors.items()})
            write_json(self.directory / self.record, as_json(self.identity()))

    def read(self, number: int) -> Kept:
        """What stays in a range, once it is done."""
        tensors, _ = read_tensors(self.directory / _FILE)
        return Kept(*(tensors[f"{number}.{part}"].bool() for part in _PARTS))
