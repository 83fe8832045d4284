"""What samples are measured against, out of a data config."""

from __future__ import annotations

from stagepatch.data import DataConfig, in_memory, load_dataset
from stagepatch.evaluation.paired import References


def load_references(config: DataConfig) -> References:
    """The training images of a data config, and for digits the held-out third."""
    train = in_memory(load_dataset(config))
    held_out = in_memory(load_dataset(config, "held_out")) if config.source == "digits" else None
    return References(train, held_out)
