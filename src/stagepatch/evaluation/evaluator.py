"""Models sampled and measured against the same references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stagepatch.data import DataConfig, ImageDataset, with_channels
from stagepatch.evaluation.features import ClassifierFeatures, FeatureExtractor, extract_features, load_extractor
from stagepatch.evaluation.metrics import METRICS, Reference
from stagepatch.evaluation.references import References, load_references, reference_features
from stagepatch.sampling import LatentSampling, SamplingConfig, generate, latent_sampling, spread

OnBatch = Callable[[int], None]


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


class Evaluator:
    """Measures models, all alike. What is needed of the references is computed once, when it is first asked for.

    Args:
        references: what samples are measured against.
        extractor: of features.
        latents: how a model of latents is sampled.
        second: other features, in which FID is measured too.
    """

    def __init__(
        self,
        references: References,
        extractor: FeatureExtractor,
        latents: LatentSampling | None = None,
        second: FeatureExtractor | None = None,
    ) -> None:
        self.references, self.extractor, self.latents = references, extractor, latents
        self._second = None if second is None else Evaluator(references, second)
        self._features: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        model: str,
        data: DataConfig,
        extractor: str,
        cache: Path,
        held_out: Literal["held_out", "tune"] = "held_out",
        second: str = "",
        text_dtype: torch.dtype = torch.float32,
    ) -> Evaluator:
        """For the samples of a model, patched or not.

        Args:
            model: a model directory, a Hub id, 'digits' or 'fashion'.
            data: the images that it was trained on.
            extractor: its name.
            cache: directory of the latents and captions of a model with a VAE, made first if it is not there.
            held_out: which of the held-out images; see `load_references`.
            second: name of an extractor, in whose features FID is measured too.
            text_dtype: that text encoders are loaded in, where the cache has to be made.

        Raises:
            UserError: the cache is of something else, the data or the extractor cannot be had, or these do not fit.
        """
        data = with_channels(data, model)
        latents = latent_sampling(model, data, cache, text_dtype)
        extractors = [load_extractor(name) for name in (extractor, *([second] if second else []))]
        references = load_references(data, held_out)
        for one in extractors:  # what does not fit is refused here, not when all is sampled
            if isinstance(one, ClassifierFeatures):
                one(references.train[0]["image"].unsqueeze(0))
        return cls(references, extractors[0], latents, *extractors[1:])

    def without_held_out(self) -> Evaluator:
        """The same with the training images alone, for a choice that the held-out ones are to judge."""
        other = copy.copy(self)  # features are shared
        other.references = replace(self.references, held_out=None)
        other._second = None if self._second is None else self._second.without_held_out()
        return other

    def reference(self, name: Reference) -> Tensor | None:
        """What metrics compare with (see `Metric`): features [R, F] or pixels [R, C, H, W]; None if there is none."""
        train, held_out = self.references.train, self.references.held_out
        if name == "pixels":
            return train.images if isinstance(train, ImageDataset) else None
        if name == "second":
            return None if self._second is None else self._second.reference("unseen")
        if name == "unseen":
            name = "train" if held_out is None else "held_out"
        dataset = train if name == "train" else held_out
        if dataset is not None and name not in self._features:
            self._features[name] = reference_features(dataset, self.extractor)
        return None if dataset is None else self._features[name]

    def labels(self, count: int) -> Tensor:
        """The labels that are sampled, [count]: those of the training images, in their shares whatever the count."""
        train = self.references.train
        labels = train.labels if isinstance(train, ImageDataset) else torch.tensor(train.labels())
        return labels.sort().values[spread(len(labels), count)]

    def metrics(self, images: Tensor, keys: Iterable[str] | None = None) -> dict[str, float]:
        """Metrics of samples [B, C, H, W] in [−1, 1], by key; those left out whose reference there is not.

        Args:
            keys: of METRICS; all by default.
        """
        samples = {"pixels": images.clamp(-1.0, 1.0)}
        found = {}
        for key in METRICS if keys is None else keys:
            metric = METRICS[key]
            reference = self.reference(metric.reference)
            if reference is None:
                continue
            of = self._second if metric.reference == "second" else self
            name: str = metric.reference if metric.reference in ("pixels", "second") else "features"
            if name not in samples and of is not None:
                samples[name] = extract_features(of.extractor, images)
            found[key] = metric.function(samples[name], reference)
        return found

    def sample(
        self, model: nn.Module, scheduler: Any, sampling: SamplingConfig, on_batch: OnBatch | None = None
    ) -> Tensor:
        """Images [B, C, H, W] of `labels`.

        Args:
            scheduler: the one that the model was trained with.
            on_batch: called with the number of images done after each batch.
        """
        latents: dict[str, Any] = {} if self.latents is None else vars(self.latents)
        labels = self.labels(sampling.num_images)
        return generate(model, scheduler, sampling, labels, on_batch=on_batch, **latents)

    def measure(
        self,
        model: nn.Module,
        scheduler: Any,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_batch: OnBatch | None = None,
    ) -> Measured:
        """`sample` with each seed, and `metrics`: two calls with the same seeds start from the same noise."""
        metrics, first = [], torch.empty(0)
        for index, seed in enumerate(seeds):
            images = self.sample(model, scheduler, replace(sampling, seed=seed), on_batch)
            metrics.append(self.metrics(images))
            first = images if index == 0 else first
        return Measured(metrics, first)


def evaluate(images: Tensor, references: References, extractor: FeatureExtractor) -> dict[str, float]:
    """All metrics of samples [B, C, H, W] in [−1, 1], by key."""
    return Evaluator(references, extractor).metrics(images)
