"""A model of several denoisers, each for a part of the noise levels: all of them trained, one after the other."""

from dataclasses import replace
from pathlib import Path

import yaml

from stagepatch.checkpoints import denoiser_ranges
from stagepatch.core import UserError, processes, write_json
from stagepatch.data import cache_directory
from stagepatch.methods import PerDenoiser
from stagepatch.training.run import Run, write_run_config
from stagepatch.training.run_config import TrainConfig


def train_all(config: TrainConfig, config_text: str = "") -> None:
    """Train what the method trains on each denoiser of a model; one is in memory at a time.

    A model of one denoiser is trained by `Run`. The result of several is one directory, which `open_artifact` puts on
    a pipeline; it is whole once all are trained, and the same call again goes on where it stopped.

    Args:
        config_text: kept as run.yaml; by default the config.

    Raises:
        UserError, Interrupted: see `Run`.
    """
    ranges = denoiser_ranges(config.model)
    if config.component or len(ranges) == 1:
        Run(config, config_text=config_text).train()
        return
    if config.memory.gguf:
        raise UserError(f"memory.gguf='{config.memory.gguf}' is one denoiser: name it with --component.")
    directory, cache = Path(config.output_dir), str(cache_directory(config.cache, config.output_dir))
    for name in ranges:
        where = PerDenoiser.directory_of(directory, name)
        Run(replace(config, component=name, output_dir=str(where), cache=cache)).train()
    if processes().is_main_process:
        write_run_config(directory, config_text or yaml.safe_dump(vars(config), sort_keys=False))
        write_json(directory / PerDenoiser.marker, {name: {"range": list(ends)} for name, ends in ranges.items()})
