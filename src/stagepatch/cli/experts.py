"""Limit LoRAs to ranges of timesteps, in one file."""

from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.core import UserError
from stagepatch.sampling import LimitedLoRA, write_limited_loras


def experts(config: configs.ExpertsConfig, resolved: str) -> None:
    """Write a file of LoRAs and the ranges that they act in."""
    if not config.loras or len(config.ranges) != len(config.loras):
        raise UserError(f"{len(config.ranges)} ranges for {len(config.loras)} loras: give each its range.")
    weights = config.weights or [1.0] * len(config.loras)
    if len(weights) != len(config.loras):
        raise UserError(f"{len(weights)} weights for {len(config.loras)} loras: give one for each, or none.")
    loras = []
    for place, ends, weight in zip(config.loras, config.ranges, weights, strict=True):
        if len(ends) != 2:
            raise UserError(f"The range of '{place}' is {ends}: give its two ends, such as [500, 1000].")
        if place.endswith(".safetensors") and not Path(place).is_file():
            raise UserError(f"No LoRA at '{place}': no such file.")
        loras.append(LimitedLoRA(place, ends[0], ends[1], weight))
    write_limited_loras(Path(config.output), loras)
    say(f"The schedule is in '{config.output}': stagepatch sample --schedule {config.output}")
