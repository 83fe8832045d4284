"""Models sampled and measured against the same references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stagepatch.data import DataConfig, ImageDataset, fit_to_model
from stagepatch.evaluation.features import (
    ClassifierFeatures,
    ClipFeatures,
    FeatureExtractor,
    OneOutput,
    extract_outputs,
    load_extractor,
    load_others,
    outputs_of,
)
from stagepatch.evaluation.metrics import Collected, Metric, Split, chosen, measure_collected
from stagepatch.evaluation.neighbours import nearest_distance
from stagepatch.evaluation.references import References, load_references, reference_features
from stagepatch.evaluation.statistics import Statistics
from stagepatch.evaluation.uncertainty import measure_left_out
from stagepatch.sampling import LatentSampling, SamplingConfig, generate, latent_sampling, spread

OnBatch = Callable[[int], None]


@dataclass
class Measured:
    """One model's samples and metrics.

    Args:
        metrics: a dict of metrics for each seed.
        images: of the first seed, [B, C, H, W].
        without: of a single seed, its metrics without each group of images, by key; see `measure_left_out`.
    """

    metrics: list[dict[str, float]]
    images: Tensor
    without: dict[str, list[float]] = field(default_factory=dict)

    def values(self, name: str) -> list[float]:
        """One metric, seed by seed."""
        return [metrics[name] for metrics in self.metrics]


class Evaluator:
    """Measures models, all alike. What is needed of the references is computed once, when it is first asked for.

    Attributes:
        extractors: all of them, by name.

    Args:
        references: what samples are measured against.
        extractor: of features.
        latents: how a model of latents is sampled.
        second: other features, in which FID is measured too.
        others: extractors that metrics ask for by name, such as 'clip'.
        keys: of the METRICS that are measured where no others are named; those that always are by default.
    """

    def __init__(
        self,
        references: References,
        extractor: FeatureExtractor,
        latents: LatentSampling | None = None,
        second: FeatureExtractor | None = None,
        others: Mapping[str, FeatureExtractor] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        self.references, self.extractor, self.latents, self.keys = references, extractor, latents, keys
        self.extractors = {"features": extractor, **({} if second is None else {"second": second}), **(others or {})}
        self._features: dict[tuple[Split, str], Tensor] = {}
        self._moments: dict[tuple[Split, str], Statistics] = {}

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
        metrics: Sequence[str] = (),
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
            metrics: keys of METRICS, or 'all'; those that are always measured by default. 'all' leaves out what needs
                an extractor that cannot be had.

        Raises:
            UserError: the cache is of something else, the data or an extractor cannot be had, these do not fit, or
                there is no such metric.
        """
        keys = list(metrics) or None
        others = load_others({metric.of for metric in chosen(keys).values()}, is_optional="all" in metrics)
        data = fit_to_model(data, model)
        latents = latent_sampling(model, data, cache, text_dtype)
        extractors = [load_extractor(name) for name in (extractor, *([second] if second else []))]
        references = load_references(data, held_out)
        for one in extractors:  # what does not fit is refused here, not when all is sampled
            if isinstance(one, ClassifierFeatures):
                one(references.train[0]["image"].unsqueeze(0))
        return cls(references, extractors[0], latents, extractors[1] if second else None, others, keys)

    def without_held_out(self) -> Evaluator:
        """The same with the training images alone, for a choice that the held-out ones are to judge."""
        other = copy.copy(self)  # features are shared
        other.references = replace(self.references, held_out=None)
        return other

    def reference(self, split: Split, of: str = "features") -> Tensor | None:
        """What metrics compare with (see `Metric`), [R, ...] a row an image; None if there is none.

        Args:
            of: what is wanted of these images, see `collect`.
        """
        split = self._standing_for(split)
        dataset = self.references.train if split == "train" else self.references.held_out
        if dataset is None or split == "captions":
            return None
        if of == "pixels":
            return dataset.images if isinstance(dataset, ImageDataset) else None
        place, extractor = (split, of), self.extractors.get(of)
        if of in outputs_of(self.extractor) and of != "features":
            extractor = OneOutput(self.extractor, of)
        if place not in self._features:
            images, train = self.reference(split, "pixels"), self.reference("train", "pixels")
            if extractor is not None:
                self._features[place] = reference_features(dataset, extractor)
            elif of == "nearest_pixels" and images is not None and train is not None:
                self._features[place] = nearest_distance(images, train)
        return self._features.get(place)

    def _standing_for(self, split: Split) -> Split:
        unseen: Split = "train" if self.references.held_out is None else "held_out"
        return unseen if split == "unseen" else split

    def _reference_of(self, split: Split, metric: Metric) -> Collected | None:
        """`reference`, or its mean and covariance, which are computed once."""
        reference, place = self.reference(split, metric.of), (self._standing_for(split), metric.of)
        if reference is None or not metric.moments:
            return reference
        if place not in self._moments:
            self._moments[place] = Statistics.of(reference)
        return self._moments[place]

    def labels(self, count: int) -> Tensor:
        """The labels that are sampled, [count]: those of the training images, in their shares whatever the count."""
        train = self.references.train
        labels = train.labels if isinstance(train, ImageDataset) else torch.tensor(train.labels())
        return labels.sort().values[spread(len(labels), count)]

    def collect(
        self, images: Tensor, keys: Iterable[str] | None = None, captions: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """What metrics take of samples, a row an image. What was collected of parts, concatenated, is that of all.

        It holds, as far as the metrics need it and it can be had: 'features' [B, F] of the extractor and what else it
        puts out ('logits' [B, K], 'spatial' [B, S]); features of the 'second' extractor and of the others, by name;
        'nearest_pixels' [B], the Euclidean distance to the nearest training image; 'pixels', the images themselves;
        'captions' [B, F], CLIP's embeddings of the captions.

        Args:
            images: [B, C, H, W] in [−1, 1].
            keys: of METRICS; the evaluator's by default.
            captions: that the images were made of.
        """
        metrics = chosen(self.keys if keys is None else keys).values()
        wanted = {metric.of for metric in metrics}
        own = [name for name in outputs_of(self.extractor) if name in wanted]
        found = extract_outputs(self.extractor, images, own) if own else {}
        for name, extractor in self.extractors.items():
            if name in wanted and name != "features":
                found[name] = extract_outputs(extractor, images)["features"]
        pixels, train = images.clamp(-1.0, 1.0), self.reference("train", "pixels")
        if "nearest_pixels" in wanted and train is not None:
            found["nearest_pixels"] = nearest_distance(pixels, train)
        if "pixels" in wanted:
            found["pixels"] = pixels
        clip = self.extractors.get("clip")
        if captions is not None and isinstance(clip, ClipFeatures):
            found["captions"] = clip.of_captions(captions)
        return found

    def measure_collected(
        self, samples: Mapping[str, Collected], keys: Iterable[str] | None = None
    ) -> dict[str, float]:
        """Metrics of what `collect` found, by key; those left out that need what there is not.

        Args:
            keys: of METRICS; the evaluator's by default.

        Raises:
            UserError: features that are no numbers.
        """
        return measure_collected(samples, self._reference_of, self.keys if keys is None else keys)

    def measure_left_out(
        self, samples: Mapping[str, Collected], keys: Iterable[str] | None = None
    ) -> dict[str, list[float]]:
        """Metrics without each of some groups of images, for intervals over images; see `measure_left_out`."""
        return measure_left_out(samples, self._reference_of, self.keys if keys is None else keys)

    def metrics(self, images: Tensor, keys: Iterable[str] | None = None) -> dict[str, float]:
        """`collect` of samples [B, C, H, W] in [−1, 1], and `measure_collected`."""
        keys = None if keys is None else list(keys)
        return self.measure_collected(self.collect(images, keys), keys)

    def sample(
        self,
        model: nn.Module,
        scheduler: Any,
        sampling: SamplingConfig,
        on_batch: OnBatch | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Tensor:
        """Images [B, C, H, W] of `labels`.

        Args:
            scheduler: the one that the model was trained with.
            on_batch: called with the number of images done after each batch.
            numbers: which of them, made by this process alone; all by default.
        """
        latents: dict[str, Any] = {} if self.latents is None else vars(self.latents)
        labels = self.labels(sampling.num_images)
        return generate(model, scheduler, sampling, labels, on_batch=on_batch, numbers=numbers, **latents)

    def measure(
        self,
        model: nn.Module,
        scheduler: Any,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_batch: OnBatch | None = None,
    ) -> Measured:
        """`sample` with each seed, and `metrics`: two calls with the same seeds start from the same noise."""
        metrics, without, first = [], {}, torch.empty(0)
        for index, seed in enumerate(seeds):
            images = self.sample(model, scheduler, replace(sampling, seed=seed), on_batch)
            samples = self.collect(images)
            metrics.append(self.measure_collected(samples))
            if len(seeds) == 1:
                without = self.measure_left_out(samples)
            first = images if index == 0 else first
        return Measured(metrics, first, without)


def evaluate(images: Tensor, references: References, extractor: FeatureExtractor) -> dict[str, float]:
    """All metrics of samples [B, C, H, W] in [−1, 1], by key."""
    return Evaluator(references, extractor).metrics(images)
