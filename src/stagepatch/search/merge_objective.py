"""What a merge is worth: FID of a few samples, from the same noise for all weights."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from stagepatch.checkpoints import add_projections, load_denoiser
from stagepatch.checkpoints.fingerprint import denoiser_reader, model_fingerprint, weights_fingerprint
from stagepatch.checkpoints.loading import find_model
from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core.errors import UserError
from stagepatch.core.processes import processes
from stagepatch.core.tensor_stream import TensorReader
from stagepatch.data import ImageDataset
from stagepatch.evaluation import (
    FeatureExtractor,
    LatentSampling,
    References,
    fid,
    latent_sampling,
    load_extractor,
    load_references,
)
from stagepatch.evaluation.features import extract_features
from stagepatch.evaluation.reference import features_of
from stagepatch.merging.merge import PIECE, ProjectedReader, Ties, check_same, combine
from stagepatch.merging.stages import Stages, merge_lora_stages
from stagepatch.methods import load_learned
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.sampling import SamplingConfig, generate
from stagepatch.search.config import MergeConfig


class Merged(Protocol):
    """A model for any weights.

    Attributes:
        scheduler: the one the base was trained with.
    """

    scheduler: Any

    def at(self, weights: Sequence[float]) -> nn.Module: ...


class MergedModel:
    """One model in memory, overwritten for each weights by what `merge_models` would write.

    Base and stages are held on the CPU as their files hold them.

    Raises:
        UserError: a stage of another architecture, by name of what differs.
    """

    def __init__(self, stages: Stages, ties: Ties | None = None) -> None:
        found = [denoiser_reader(directory) for directory in (find_model(stages.base), *stages.directories)]
        base, *others = [ProjectedReader(reader, found) for reader in found]
        for directory, other in zip(stages.directories, others, strict=True):
            check_same(base, other, directory)
        model, self.scheduler = load_denoiser(stages.base)
        _add_projections(model, base.names())
        self._model: nn.Module = model.to(processes().device)
        self._parts = {name: [reader.read(name) for reader in (base, *others)] for name in base.names()}
        self._ties = ties

    @torch.no_grad()
    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        own = self._model.state_dict()
        for name, parts in self._parts.items():
            size = max(1, parts[0].numel()) if self._ties else PIECE
            pieces = [tensor.view(-1).split(size) for tensor in (own[name], *parts)]
            for target, base, *stages in zip(*pieces, strict=True):
                target.copy_(combine(base, stages, weights, self._ties))
        return self._model


def _add_projections(model: nn.Module, names: Sequence[str]) -> None:
    """The channel projections that stages have and their base has not."""
    numbers = [int(name.split(".")[-1]) for name in names if name.startswith(f"{PROJECTION}.")]
    if numbers and not hasattr(model, PROJECTION):
        add_projections(model, numbers)


class MergedLoRA:
    """The base, and on a copy of it what `merge_lora_stages` would write."""

    def __init__(self, stages: Stages) -> None:
        self._base, self.scheduler = load_denoiser(stages.base)
        self._directories = stages.directories

    def at(self, weights: Sequence[float]) -> nn.Module:
        """A new model at these weights."""
        model: nn.Module = copy.deepcopy(self._base)
        with tempfile.TemporaryDirectory() as directory:
            merge_lora_stages(self._directories, weights, Path(directory))
            load_learned(model, Path(directory))
        return model.to(processes().device)


class SampleFID:
    """FID of samples at given weights. Labels, noise and references never change, so the same weights give the same.

    Args:
        merged: gives the model.
        sampling: sampler, count, and the seed of the noise.
        metric: 'fid_train' or 'fid_held_out'.
        latents: how a model of latents is sampled.

    Raises:
        UserError: no held-out images.
    """

    def __init__(
        self,
        merged: Merged,
        sampling: SamplingConfig,
        references: References,
        extractor: FeatureExtractor,
        metric: str = "fid_train",
        latents: LatentSampling | None = None,
    ) -> None:
        images = references.train if metric == "fid_train" else references.held_out
        if images is None:
            raise UserError(f"search.metric='{metric}': these data have no held-out images; use 'fid_train'.")
        train = references.train
        labels = train.labels if isinstance(train, ImageDataset) else torch.tensor(train.labels())
        self._labels = labels[torch.arange(sampling.num_images) % len(labels)]
        self._merged, self._sampling, self._extractor = merged, sampling, extractor
        self._reference = features_of(images, extractor)
        self._latents: dict[str, Any] = {} if latents is None else vars(latents)

    def __call__(self, weights: Sequence[float]) -> float:
        """FID; infinite where a merge samples no numbers."""
        model = self._merged.at(weights)
        images = generate(model, self._merged.scheduler, self._sampling, self._labels, **self._latents)
        features = extract_features(self._extractor, images)
        return fid(features, self._reference) if bool(features.isfinite().all()) else math.inf


def make_objective(config: MergeConfig, stages: Stages) -> SampleFID:
    """What a search of `stagepatch merge` evaluates.

    Raises:
        UserError: a stage of another architecture, or data or an extractor that cannot be had.
    """
    ties = Ties(config.ties_keep) if config.ties_keep else None
    merged: Merged = MergedLoRA(stages) if stages.are_loras else MergedModel(stages, ties)
    latents = latent_sampling(stages.base, config.data, Path(config.cache or Path(config.output_dir) / "cache"))
    references, extractor = load_references(config.data), load_extractor(config.extractor)
    return SampleFID(merged, config.sampling, references, extractor, config.search.metric, latents)


def objective_identity(config: MergeConfig, stages: Stages) -> dict[str, Any]:
    """All that an evaluation depends on."""
    return {
        "base": model_fingerprint(find_model(stages.base)),
        "stages": [_fingerprint(directory, stages.are_loras) for directory in stages.directories],
        "ties_keep": config.ties_keep,
        "metric": config.search.metric,
        "extractor": config.extractor,
        "sampling": config.sampling,
        "data": config.data,
    }


def _fingerprint(directory: Path, is_lora: bool) -> str:
    return weights_fingerprint(TensorReader([directory / LORA_FILE])) if is_lora else model_fingerprint(directory)
