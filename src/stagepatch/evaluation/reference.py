"""Features of reference images, cached by content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from torch import Tensor

from stagepatch.errors import UserError
from stagepatch.evaluation.features import FeatureExtractor, extract_features
from stagepatch.files import read_tensors, write_tensors


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
    path = (cache or cache_directory()) / "features" / f"{digest.hexdigest()}.safetensors"
    try:
        cached = read_tensors(path)[0].get("features")
        if cached is not None and len(cached) == len(images):
            return cached
    except UserError:
        pass
    features = extract_features(extractor, images)
    with contextlib.suppress(UserError):
        write_tensors(path, {"features": features})
    return features
