"""Features of reference images, cached by content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_tensors, write_tensors
from stagepatch.data import ImageDataset, Images
from stagepatch.evaluation.features import FeatureExtractor, extract_features


def cache_directory() -> Path:
    """$STAGEPATCH_CACHE, or ~/.cache/stagepatch."""
    return Path(os.environ.get("STAGEPATCH_CACHE") or Path.home() / ".cache" / "stagepatch")


def reference_features(images: Tensor, extractor: FeatureExtractor, cache: Path | None = None) -> Tensor:
    """Features [B, F] of images, read from the cache where they are in it.

    The key is a hash of the images and of the extractor's weights, so nothing in the cache is ever stale. A broken
    file is made anew; a cache that cannot be written costs time, not the result.
    """
    digest = hashlib.sha256(f"{tuple(images.shape)} {images.dtype} {extractor.fingerprint}".encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return _cached(digest.hexdigest(), len(images), lambda: extract_features(extractor, images), cache)


def features_of(dataset: ImageDataset | Images, extractor: FeatureExtractor, cache: Path | None = None) -> Tensor:
    """Features of a dataset, read a few images at a time where it is not in memory.

    Then the key is of the files' names, sizes and times, and of how they are cropped.
    """
    if isinstance(dataset, ImageDataset):
        return reference_features(dataset.images, extractor, cache)
    digest = hashlib.sha256(f"{asdict(dataset.config)} {extractor.fingerprint}".encode())
    digest.update("\n".join(dataset.source.stamp()).encode())

    def extract() -> Tensor:
        groups = (range(first, min(first + 64, len(dataset))) for first in range(0, len(dataset), 64))
        return torch.cat([extractor(torch.stack([dataset[i]["image"] for i in group])).float() for group in groups])

    return _cached(digest.hexdigest(), len(dataset), extract, cache)


def _cached(key: str, count: int, extract: Callable[[], Tensor], cache: Path | None) -> Tensor:
    path = (cache or cache_directory()) / "features" / f"{key}.safetensors"
    try:
        cached = read_tensors(path)[0].get("features")
        if cached is not None and len(cached) == count:
            return cached
    except UserError:
        pass
    features = extract()
    with contextlib.suppress(UserError):
        write_tensors(path, {"features": features})
    return features
