"""What samples are measured against, out of a data config."""

from __future__ import annotations

from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig, ImageDataset, Images, in_memory, load_dataset
from stagepatch.evaluation.evaluate import References

_MOST_NUMBERS = 2**28  # a GiB of float32


def load_references(config: DataConfig) -> References:
    """The training images of a data config, in memory where they are few, and for digits the held-out third.

    Raises:
        UserError: images of many sizes.
    """
    if config.source == "digits":
        return References(in_memory(load_dataset(config)), in_memory(load_dataset(config, "held_out")))
    if config.crop != "center":
        raise UserError(f"data.crop='{config.crop}' makes images of many sizes: metrics need crop 'center'.")
    dataset = load_dataset(config)
    assert isinstance(dataset, Images | ImageDataset)
    numbers = len(dataset) * config.channels * config.image_size**2
    is_small = numbers <= _MOST_NUMBERS
    return References(in_memory(dataset) if is_small else dataset, None)
