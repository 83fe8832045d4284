"""Base and patched model from the same noise, measured seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.data.dataset import ImageDataset
from stagepatch.evaluation.evaluate import evaluate
from stagepatch.evaluation.features import FeatureExtractor
from stagepatch.sampling import SamplingConfig, generate


@dataclass
class Measured:
    """One model's samples and metrics.

    Args:
        metrics: a dict of metrics for each seed.
        images: of the first seed, [B, C, H, W].
    """

    metrics: list[dict[str, float]]
    images: Tensor

    def values(self, name: str) -> list[float]:
        """One metric, seed by seed."""
        return [metrics[name] for metrics in self.metrics]


@dataclass
class References:
    """What samples are measured against.

    Args:
        train: the images that the model was trained on.
        held_out: images that nothing was trained on, where there are any.
    """

    train: ImageDataset
    held_out: ImageDataset | None


def measure(
    model: nn.Module,
    scheduler: Any,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    references: References,
    extractor: FeatureExtractor,
    on_batch: Callable[[int], None] | None = None,
) -> Measured:
    """Sample with each seed, with the training images' labels in turn, and measure.

    Args:
        model: patched or not; two calls with the same seeds start from the same noise.
        on_batch: called with the number of images done after each batch.
    """
    labels = references.train.labels[torch.arange(sampling.num_images) % len(references.train)]
    held_out = None if references.held_out is None else references.held_out.images
    metrics, first = [], torch.empty(0)
    for index, seed in enumerate(seeds):
        images = generate(model, scheduler, replace(sampling, seed=seed), labels, on_batch=on_batch)
        metrics.append(evaluate(images, references.train.images, held_out, extractor))
        first = images if index == 0 else first
    return Measured(metrics, first)
