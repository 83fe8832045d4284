"""All metrics of a set of samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stagepatch.data import ImageDataset, Images
from stagepatch.evaluation.features import FeatureExtractor, extract_features
from stagepatch.evaluation.metrics import fid, kid, nearest_distance, precision_recall
from stagepatch.evaluation.reference import features_of


@dataclass
class References:
    """What samples are measured against.

    Args:
        train: the images that the model was trained on, in memory or to be read.
        held_out: images that nothing was trained on, where there are any.
    """

    train: ImageDataset | Images
    held_out: ImageDataset | None


def evaluate(images: Tensor, references: References, extractor: FeatureExtractor) -> dict[str, float]:
    """Metrics by key (see `metric_names`).

    KID, precision and recall are against held-out images where there are any, else against the training images. The
    distance to the nearest training image is taken where those are in memory.

    Args:
        images: samples [B, C, H, W] in [−1, 1].
    """
    features = extract_features(extractor, images)
    train = features_of(references.train, extractor)
    held_out = None if references.held_out is None else features_of(references.held_out, extractor)
    metrics = {"fid_train": fid(features, train)}
    if held_out is not None:
        metrics["fid_held_out"] = fid(features, held_out)
    precision, recall = precision_recall(features, train if held_out is None else held_out)
    metrics |= {
        "kid": kid(features, train if held_out is None else held_out),
        "precision": precision,
        "recall": recall,
    }
    if isinstance(references.train, ImageDataset):
        distances = nearest_distance(images.clamp(-1.0, 1.0), references.train.images)
        metrics["nearest_train"] = float(distances.median())
    return metrics


def metric_names(features: str) -> dict[str, str]:
    """How each key is called in tables, given the extractor's name."""
    return {
        "fid_train": f"FID ({features}), training images",
        "fid_held_out": f"FID ({features}), held-out images",
        "kid": f"KID ({features})",
        "precision": "precision",
        "recall": "recall",
        "nearest_train": "distance to nearest training image, median",
    }
