"""Base and patched model from the same noise, measured seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.data import ImageDataset
from stagepatch.evaluation.evaluate import References, evaluate
from stagepatch.evaluation.features import FeatureExtractor
from stagepatch.sampling import Captions, SamplingConfig, generate


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
class LatentSampling:
    """What `generate` takes for a model of latents.

    Args:
        shape: C, h, w of the latents.
        decode: makes images of them.
        captions: conditions of a model that takes captions.
    """

    shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    captions: Captions | None


def measure(
    model: nn.Module,
    scheduler: Any,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    references: References,
    extractor: FeatureExtractor,
    on_batch: Callable[[int], None] | None = None,
    latents: LatentSampling | None = None,
) -> Measured:
    """Sample with each seed, with the training images' labels in turn, and measure.

    Args:
        model: patched or not; two calls with the same seeds start from the same noise.
        on_batch: called with the number of images done after each batch.
        latents: how a model of latents is sampled.
    """
    train = references.train
    labels = train.labels if isinstance(train, ImageDataset) else torch.tensor(train.labels())
    labels = labels[torch.arange(sampling.num_images) % len(labels)]
    more: dict[str, Any] = {} if latents is None else vars(latents)
    metrics, first = [], torch.empty(0)
    for index, seed in enumerate(seeds):
        images = generate(model, scheduler, replace(sampling, seed=seed), labels, on_batch=on_batch, **more)
        metrics.append(evaluate(images, references, extractor))
        first = images if index == 0 else first
    return Measured(metrics, first)
