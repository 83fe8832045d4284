"""From a config to stages; everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stagepatch.checkpoints import build_denoiser
from stagepatch.checkpoints.loading import load_scheduler
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json
from stagepatch.core.randomness import STAGE, seed_for
from stagepatch.core.settings import check_unchanged
from stagepatch.diffusion import Objective, make_weighting
from stagepatch.diffusion.timesteps import TimestepSampler, equal_in_log_snr, equal_in_t, split_at
from stagepatch.methods import make_method
from stagepatch.studies.decouple_config import DecoupleConfig
from stagepatch.training import BOOKKEEPING

STAGES, STAGE_NAME = "stages", "stage.json"


@dataclass
class Stage:
    """A range of timesteps, from `first` to `stop` − 1, and how its copy is trained."""

    number: int
    first: int
    stop: int
    config: DecoupleConfig

    @property
    def directory(self) -> Path:
        """Where its result and its training run are."""
        return Path(self.config.output_dir) / STAGES / str(self.number)

    @property
    def cache(self) -> Path:
        """Of a model with a VAE."""
        return Path(self.config.cache or Path(self.config.output_dir) / "cache")

    def __str__(self) -> str:
        return f"stage {self.number} (timesteps {self.first} to {self.stop - 1})"

    def identity(self) -> dict[str, Any]:
        """All that decides its result."""
        elsewhere = ("output_dir", "num_stages", "split", "boundaries", "stage", "cache", "launch")
        values = {name: value for name, value in vars(self.config).items() if name not in elsewhere}
        return {**values, "first": self.first, "stop": self.stop}


def plan_stages(config: DecoupleConfig) -> list[Stage]:
    """The stages, from the image's end to the noise's.

    Raises:
        UserError: ranges that cannot be had, a method that the model cannot take, or a `stage` that is not there.
    """
    scheduler = load_scheduler(config.model)
    model = build_denoiser(config.model)
    make_method(config.method, config.patch, config.lora).prepare(model)
    objective = Objective(scheduler, weighting=make_weighting(config.weighting))
    total = objective.num_train_timesteps
    if config.boundaries:
        ranges = split_at(total, config.boundaries)
    elif config.split == "log_snr":
        ranges = equal_in_log_snr(objective.snr(torch.arange(total)), config.num_stages)
    else:
        ranges = equal_in_t(total, config.num_stages)
    for first, stop in ranges:
        TimestepSampler(total, first, stop, config.p, bool(config.antithetic))
    if not -1 <= config.stage < len(ranges):
        raise UserError(f"stage={config.stage} is none of 0 to {len(ranges) - 1}; -1 is all.")
    stages = [Stage(number, *ends, _with_own_seed(config, number)) for number, ends in enumerate(ranges)]
    for stage in stages:
        _check_directory(stage)
    return stages


def _with_own_seed(config: DecoupleConfig, number: int) -> DecoupleConfig:
    """From common draws, task vectors would share their noise, which then does not average out in a merge."""
    seed = seed_for(STAGE, config.training.seed, number)
    return replace(config, training=replace(config.training, snapshot_every=0, seed=seed))


def _check_directory(stage: Stage) -> None:
    path = stage.directory / STAGE_NAME
    if not path.exists():
        return
    now, facts = stage.identity(), read_json(path)
    then = {name: facts[name] for name in now if name in facts}
    found = f"'{stage.directory}' holds a stage of another config"
    way_out = "Give another output_dir, or delete that directory."
    check_unchanged(then, now, found, way_out, DecoupleConfig(), BOOKKEEPING)
