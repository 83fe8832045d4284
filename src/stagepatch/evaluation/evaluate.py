"""All metrics of a set of samples."""

from __future__ import annotations

from torch import Tensor

from stagepatch.evaluation.features import FeatureExtractor, extract_features
from stagepatch.evaluation.metrics import fid, kid, nearest_distance, precision_recall
from stagepatch.evaluation.reference import reference_features


def evaluate(
    images: Tensor, train_images: Tensor, held_out_images: Tensor | None, extractor: FeatureExtractor
) -> dict[str, float]:
    """Metrics by key (see `metric_names`).

    KID, precision and recall are against held-out images where there are any, else against the training images.

    Args:
        images: samples [B, C, H, W] in [−1, 1].
        train_images, held_out_images: references of that range.
    """
    features = extract_features(extractor, images)
    train = reference_features(train_images, extractor)
    held_out = None if held_out_images is None else reference_features(held_out_images, extractor)
    metrics = {"fid_train": fid(features, train)}
    if held_out is not None:
        metrics["fid_held_out"] = fid(features, held_out)
    precision, recall = precision_recall(features, train if held_out is None else held_out)
    return metrics | {
        "kid": kid(features, train if held_out is None else held_out),
        "precision": precision,
        "recall": recall,
        "nearest_train": float(nearest_distance(images.clamp(-1.0, 1.0), train_images).median()),
    }


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
