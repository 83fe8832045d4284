"""Feature extractors, by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from stagepatch.checkpoints import from_hub, is_hub_id, module_fingerprint, split_revision
from stagepatch.core import UserError, as_user_error, processes
from stagepatch.evaluation.classifiers import CLASSIFIERS, load_classifier
from stagepatch.evaluation.inception import SIZE, load_inception, resize_as_tensorflow

_CLEAN = "quantised to 8 bits, resized to {size}×{size} by PIL's antialiased bicubic filter in float (clean-fid)"


class FeatureExtractor(Protocol):
    """Images [B, C, H, W] in [−1, 1] to features [B, F].

    One that puts out more than features may have `outputs`, of images to such tensors by name, and `output_names`. One
    that says how it prepares images has `preprocessing`, in words, and `num_features` is F. One that may come from the
    Hub has the name that it was asked for by as `source`.

    Attributes:
        name: as metrics are labelled, such as 'digits features'.
        fingerprint: changes with the weights and with how images are prepared.
    """

    name: str
    fingerprint: str

    def __call__(self, images: Tensor) -> Tensor: ...


class ClassifierFeatures:
    """A bundled classifier's activations before its last layer: [B, F]; and its logits."""

    output_names = ("features", "logits")
    preprocessing = "as they are, values clamped to [−1, 1]"

    def __init__(self, name: str) -> None:
        self.name = f"{name.replace('_', ' ')} features"
        self.classifier = load_classifier(name)
        self.num_features = self.classifier.num_features
        self.fingerprint = module_fingerprint(self.classifier)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """'features' [B, F] and 'logits' [B, 10]."""
        features = self.classifier.features(images)
        return {"features": features, "logits": self.classifier.head(features / self.classifier.feature_scale)}


class InceptionFeatures:
    """FID's Inception-v3: pool features [B, 2048], spatial ones for sFID, logits for the Inception score.

    Args:
        path: of the weights; see `find_weights`.
        is_legacy: resize as TensorFlow 1 does, as ADM, pytorch-fid and torch-fidelity, not as clean-fid.
        size: height and width that images are brought to first, as where samples of 512×512 are measured at 256×256;
            0 leaves them.

    Raises:
        UserError: no weights.
    """

    output_names = ("features", "spatial", "logits")
    num_features = 2048
    batch_size = 32

    def __init__(self, path: str = "", is_legacy: bool = False, size: int = 0) -> None:
        self.name = "Inception-v3, legacy resize" if is_legacy else "Inception-v3"
        self.network, self.is_legacy, self.size = load_inception(path).to(processes().device), is_legacy, size
        if processes().device.type == "cpu":  # a fifth less time (benchmarks/RESULTS.md)
            convert_conv2d_weight_memory_format(self.network, torch.channels_last)
        legacy = f"quantised to 8 bits, resized to {SIZE}×{SIZE} as by TensorFlow 1 (bilinear, not antialiased)"
        self.preprocessing = legacy if is_legacy else _CLEAN.format(size=SIZE)
        if size:
            self.name += f", at {size}×{size}"
            self.preprocessing = f"{_CLEAN.format(size=size)} and quantised again; {self.preprocessing}"
        self.fingerprint = _fingerprint(self.network, self.preprocessing)

    def __call__(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """'features' [B, 2048], 'spatial' [B, 2023] and 'logits' [B, 1008]."""
        pixels = quantised(images)
        if self.size:
            pixels = resize_clean(pixels, self.size).round().to(torch.uint8)
        pixels = resize_as_tensorflow(pixels.float()) if self.is_legacy else resize_clean(pixels, SIZE)
        return {name: value.cpu() for name, value in self.network(pixels.to(processes().device)).items()}


class TransformerFeatures:
    """Features of an encoder of transformers, by its id on the Hub, also 'name/model@revision', or its folder: [B, F].

    Raises:
        UserError: it cannot be loaded.
    """

    label = default = ""
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    deviation: Sequence[float] = (0.5, 0.5, 0.5)
    batch_size = 64

    def __init__(self, path: str = "") -> None:
        self.source = source = path or self.default
        self.name = f"{self.label}" if source == self.default else f"{self.label}, {source}"
        try:
            self._place, self._options = _located(source)
            self.network = self._load(self._place, **self._options).eval().to(processes().device)
        except (OSError, ValueError, UserError) as error:
            raise UserError(
                f"{self.label} cannot be loaded from '{source}' ({str(error).splitlines()[0]}). Give the folder that "
                f"it is in, as in {self.label.lower()}:/path."
            ) from error
        self.size = self._size()
        self.preprocessing = f"{_CLEAN.format(size=self.size)}, mean {[*self.mean]}, deviation {[*self.deviation]}"
        self.fingerprint = _fingerprint(self.network, self.preprocessing)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = resize_clean(quantised(images), self.size) / 255.0
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (self.mean, self.deviation))
        return self._features(((pixels - mean) / deviation).to(processes().device)).float().cpu()

    def _load(self, place: str, **options: Any) -> Any:
        raise NotImplementedError

    def _size(self) -> int:
        return int(self.network.config.vision_config.image_size)

    def _features(self, pixels: Tensor) -> Tensor:
        """Prepared images [B, 3, S, S] to [B, F]."""
        features: Tensor = self.network.get_image_features(pixel_values=pixels).pooler_output
        return features


class Dinov2Features(TransformerFeatures):
    """DINOv2's class token, after the last norm (arXiv 2306.04675 of ViT-L/14, images of 224×224)."""

    label, default = "DINOv2", "facebook/dinov2-large"
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def _load(self, place: str, **options: Any) -> Any:
        from transformers import Dinov2Model

        return Dinov2Model.from_pretrained(place, **options)

    def _size(self) -> int:
        return min(224, int(self.network.config.image_size))

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixel_values=pixels).pooler_output
        return features


class ClipFeatures(TransformerFeatures):
    """CLIP's embedding of images (arXiv 2401.09603 of ViT-L/14 at 336×336), and of their captions."""

    label, default = "CLIP", "openai/clip-vit-large-patch14-336"
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def _load(self, place: str, **options: Any) -> Any:
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(place, **options)

    @torch.no_grad()
    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, [B, F], cut to the tokens that CLIP takes.

        Raises:
            UserError: the tokenizer is not there.
        """
        from transformers import AutoTokenizer

        with as_user_error(f"The tokenizer of '{self.source}' cannot be loaded", OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(self._place, **self._options)
        length = self.network.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(captions), self.batch_size):
            text = [*captions[start : start + self.batch_size]]
            tokens = tokenizer(text, padding=True, truncation=True, max_length=length, return_tensors="pt")
            found = self.network.get_text_features(**tokens.to(processes().device)).pooler_output
            parts.append(found.float().cpu())
        return torch.cat(parts)


class SiglipFeatures(TransformerFeatures):
    """SigLIP's embedding of images."""

    label, default = "SigLIP", "google/siglip-base-patch16-224"

    def _load(self, place: str, **options: Any) -> Any:
        from transformers import SiglipModel

        return SiglipModel.from_pretrained(place, **options)


class ModuleFeatures:
    """Any module of images [B, C, H, W] in [−1, 1] to features [B, F].

    Args:
        name: in tables.
        preprocessing: in words, where the module does some; features are cached by it and by the weights.
    """

    def __init__(self, module: nn.Module, name: str, preprocessing: str = "as they are") -> None:
        self.module, self.name, self.preprocessing = module.eval(), name, preprocessing
        self.fingerprint = _fingerprint(module, preprocessing)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self.module(images)
        if features.ndim != 2:
            raise UserError(f"'{self.name}' gives {[*features.shape]} of {len(images)} images: features are [B, F].")
        return features


class OneOutput:
    """One of the tensors that an extractor puts out, as its features."""

    def __init__(self, extractor: FeatureExtractor, output: str) -> None:
        self.extractor, self.output, self.name = extractor, output, f"{extractor.name}, {output}"
        self.fingerprint = f"{extractor.fingerprint} {output}"
        self.preprocessing = getattr(extractor, "preprocessing", "")

    def __call__(self, images: Tensor) -> Tensor:
        return extract_outputs(self.extractor, images, [self.output])[self.output]


def _located(source: str) -> tuple[str, dict[str, str]]:
    """The repository, and as options of `from_pretrained` the commit that is meant; a folder as it is."""
    if Path(source).exists() or not is_hub_id(source):
        return source, {}
    commit = from_hub(source, ["config.json"], "encoder").name  # transformers chooses among the weights
    return split_revision(source)[0], {"revision": commit}


def quantised(images: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [−1, 1] as 8 bits in three channels, [B, 3, H, W].

    Raises:
        UserError: another number of channels.
    """
    if images.shape[1] not in (1, 3):
        raise UserError(f"Images have 1 or 3 channels, not {images.shape[1]}: convert them to RGB first.")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def resize_clean(pixels: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] of 8 bits to [B, C, size, size] in 0 … 255 as clean-fid resizes (arXiv 2104.11222).

    PIL's bicubic filter, antialiased, of each channel in float; not rounded.
    """
    if pixels.shape[2:] == (size, size):
        return pixels.float()
    planes = pixels.float().cpu().flatten(0, 1).numpy()
    resized = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in planes]
    return torch.from_numpy(np.stack(resized).clip(0, 255)).view(*pixels.shape[:2], size, size)


EXTRACTORS = {"inception", "inception_legacy", "dinov2", "clip", "siglip", *CLASSIFIERS}


def load_extractor(name: str) -> FeatureExtractor:
    """An extractor by name: a bundled classifier, 'inception' (clean-fid's preprocessing), 'inception_legacy'
    (TensorFlow's), either also of images brought to a size first, as 'inception@256', 'dinov2', 'clip' or 'siglip',
    the latter also with an id of the Hub ('clip:name/model@revision') or a path ('clip:/path').

    Raises:
        UserError: unknown name, or what it needs cannot be had.
    """
    kind, _, path = name.partition(":")
    if kind in CLASSIFIERS and not path:
        return ClassifierFeatures(kind)
    inception = re.fullmatch(r"inception(_legacy)?(?:@([1-9]\d{0,4}))?", kind)
    if inception:
        return InceptionFeatures(path, bool(inception[1]), int(inception[2] or 0))
    transformers = {"dinov2": Dinov2Features, "clip": ClipFeatures, "siglip": SiglipFeatures}
    if kind in transformers:
        return transformers[kind](path)
    raise UserError(
        f"No feature extractor is named '{name}'. Choose one of: {', '.join(CLASSIFIERS)}, inception, "
        f"inception_legacy, {', '.join(transformers)}."
    )


def load_others(names: Collection[str], is_optional: bool = False) -> dict[str, FeatureExtractor]:
    """The extractors that metrics ask for by name, beside the one that is chosen.

    Args:
        names: of what metrics are of; those that are no extractor's are passed over.
        is_optional: leave out what cannot be had.

    Raises:
        UserError: one cannot be had.
    """
    found = {}
    for name in ("dinov2", "clip"):
        if name in names:
            try:
                found[name] = load_extractor(name)
            except UserError:
                if not is_optional:
                    raise
    return found


def outputs_of(extractor: FeatureExtractor) -> tuple[str, ...]:
    """Names of what an extractor puts out."""
    names: tuple[str, ...] = getattr(extractor, "output_names", ("features",))
    return names


def extract_outputs(
    extractor: FeatureExtractor, images: Tensor, names: Sequence[str] = ("features",), batch_size: int | None = None
) -> dict[str, Tensor]:
    """What an extractor puts out of images [B, C, H, W], by name, a batch at a time."""
    whole: dict[str, Tensor] = {}
    size: int = batch_size or int(getattr(extractor, "batch_size", 512))
    for start in range(0, len(images), size):  # into one tensor: a list to be joined holds all twice
        batch = images[start : start + size]
        found = {"features": extractor(batch)} if [*names] == ["features"] else extractor.outputs(batch)  # type: ignore[attr-defined]
        for name in names:
            if name not in whole:
                whole[name] = torch.empty(len(images), *found[name].shape[1:])
            whole[name][start : start + size] = found[name]
    return whole


def extract_features(extractor: FeatureExtractor, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Features [B, F] of images [B, C, H, W], a batch at a time."""
    return extract_outputs(extractor, images, batch_size=batch_size)["features"]


def _fingerprint(module: nn.Module, preprocessing: str) -> str:
    return hashlib.sha256(f"{module_fingerprint(module)} {preprocessing}".encode()).hexdigest()
