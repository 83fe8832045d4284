"""Train a patch, or another method, on a model."""

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.training import train_all


def train(config: configs.TrainConfig, resolved: str) -> None:
    """Train what the method trains, on top of a model."""
    train_all(config, resolved)
    say(f"The result is in '{config.output_dir}'.")
