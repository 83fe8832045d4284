"""What samples are measured against, out of a data config, and features of data sets, cached by content."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.data import (
    BUNDLED,
    IMAGE_SIZE,
    DataConfig,
    ImageDataset,
    Images,
    Mixture,
    Part,
    hold_out,
    in_memory,
    load_dataset,
)
from stagepatch.evaluation.collector import Collector
from stagepatch.evaluation.features import FeatureExtractor
from stagepatch.evaluation.shards import Shards

_MOST_NUMBERS = 2**28  # a GiB of float32
_IN_SHARD = 512
_IN_MEMORY = 64  # images at a time, of those in files


@dataclass
class References:
    """What samples are measured against.

    Args:
        train: the images that the model was trained on, in memory or to be read; of several data sets each once.
        held_out: images that nothing was trained on, where there are any.
    """

    train: ImageDataset | Images | Mixture | Part
    held_out: ImageDataset | Part | None


def load_references(config: DataConfig, held_out: Literal["held_out", "tune"] = "held_out") -> References:
    """The training images of a data config and the held-out ones, in memory where they are few.

    These come with bundled data; of other data they are the share `config.held_out`.

    Args:
        held_out: of bundled data, which of these: those to report on, or those to choose by.

    Raises:
        UserError: images of many sizes, none to choose by, or a share that holds out none or all.
    """
    if config.source in BUNDLED:
        return References(in_memory(load_dataset(config)), in_memory(load_dataset(config, held_out)))
    if held_out == "tune":
        raise UserError(f"held_out='tune' is of 'fashion' alone, not of '{config.source}'.")
    if config.crop != "center":
        raise UserError(f"data.crop='{config.crop}' makes images of many sizes: metrics need crop 'center'.")
    dataset = load_dataset(config)
    assert isinstance(dataset, Images | Mixture)
    is_small = len(dataset) * (config.channels or 3) * (config.image_size or IMAGE_SIZE) ** 2 <= _MOST_NUMBERS
    keep = in_memory if is_small else lambda part: part
    if not config.held_out:
        return References(keep(dataset), None)
    train = hold_out(dataset, dataset.keys(), config.held_out)
    return References(keep(train), keep(train.held_out))


def feature_cache() -> Path:
    """$STAGEPATCH_CACHE, or ~/.cache/stagepatch."""
    return Path(os.environ.get("STAGEPATCH_CACHE") or Path.home() / ".cache" / "stagepatch")


def reference_features(
    dataset: ImageDataset | Images | Mixture | Part, extractor: FeatureExtractor, cache: Path | None = None
) -> Tensor:
    """Features [B, F] of a dataset, read from the cache where they are in it; see `dataset_shards`."""
    return dataset_shards(dataset, Collector(extractor), cache=cache).gathered()["features"]


def dataset_shards(
    dataset: ImageDataset | Images | Mixture | Part,
    collect: Collector,
    captions: Sequence[str] = (),
    cache: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Shards:
    """What is collected of a dataset, in the cache or made when it is come to.

    The key is a hash of the extractors' weights and of the images; of those that are not in memory, of the files'
    names, sizes and times, and of how they are cropped. So nothing in the cache is ever stale. What is broken is made
    anew; a cache that cannot be written costs time, not the result.

    Args:
        captions: one an image, where a metric takes any.
        on_batch: called with the number of images that are done after each batch.
    """

    def make(numbers: range) -> dict[str, Tensor]:
        batches = []
        for part in torch.tensor(numbers).split(len(numbers) if isinstance(dataset, ImageDataset) else _IN_MEMORY):
            own = [captions[number] for number in part.tolist()] if captions else []
            batches.append(collect(_images(dataset, part), own))
            if on_batch is not None:
                on_batch(len(part))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    key = hashlib.sha256(f"{_key(dataset, collect.fingerprint)}{captions if captions else ''}".encode()).hexdigest()
    directory = (cache or feature_cache()) / "features" / key
    return Shards(directory, len(dataset), make, _IN_SHARD, must_write=False)


def _images(dataset: ImageDataset | Images | Mixture | Part, numbers: Tensor) -> Tensor:
    if isinstance(dataset, ImageDataset):
        return dataset.images[numbers]
    return torch.stack([dataset[number]["image"] for number in numbers.tolist()])


def _key(dataset: ImageDataset | Images | Mixture | Part, fingerprint: str) -> str:
    if isinstance(dataset, Part):
        digest = hashlib.sha256(f"{_key(dataset.dataset, fingerprint)} {dataset.indices}".encode())
    elif isinstance(dataset, ImageDataset):
        images = dataset.images
        digest = hashlib.sha256(f"{tuple(images.shape)} {images.dtype} {fingerprint}".encode())
        digest.update(images.cpu().contiguous().numpy().tobytes())
    else:
        digest = hashlib.sha256(f"{asdict(dataset.config)} {fingerprint}".encode())
        digest.update("\n".join(dataset.stamp()).encode())
    return digest.hexdigest()
