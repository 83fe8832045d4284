"""Feature extractors, by name."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from stagepatch.checkpoints import module_fingerprint
from stagepatch.core import UserError
from stagepatch.evaluation.classifiers import CLASSIFIERS, load_classifier


class FeatureExtractor(Protocol):
    """Images [B, C, H, W] in [−1, 1] to features [B, F].

    Attributes:
        name: as metrics are labelled, such as 'digits features'.
        fingerprint: changes with the weights.
    """

    name: str
    fingerprint: str

    def __call__(self, images: Tensor) -> Tensor: ...


class ClassifierFeatures:
    """A bundled classifier's activations before its last layer: [B, F]."""

    def __init__(self, name: str) -> None:
        self.name = f"{name.replace('_', ' ')} features"
        self.classifier = load_classifier(name)
        self.num_features = self.classifier.num_features
        self.fingerprint = module_fingerprint(self.classifier)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


class InceptionFeatures:
    """Inception-v3's pool features [B, 2048], through torch-fidelity as torchmetrics uses it."""

    name = "Inception-v3"

    def __init__(self) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except ImportError as error:
            raise UserError(
                "extractor='inception' needs torch-fidelity and its weights: pip install torch-fidelity, or use the "
                f"extractor of the bundled data that you measure: {', '.join(CLASSIFIERS)}."
            ) from error
        self.fingerprint = module_fingerprint(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self.network(pixels.expand(-1, 3, -1, -1))
        return features


_EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {
    **{name: partial(ClassifierFeatures, name) for name in CLASSIFIERS},
    "inception": InceptionFeatures,
}


def load_extractor(name: str) -> FeatureExtractor:
    """An extractor by name.

    Raises:
        UserError: unknown name, or what it needs is not installed.
    """
    if name not in _EXTRACTORS:
        raise UserError(f"No feature extractor is named '{name}'. Choose one of: {', '.join(_EXTRACTORS)}.")
    return _EXTRACTORS[name]()


def extract_features(extractor: FeatureExtractor, images: Tensor, batch_size: int = 512) -> Tensor:
    """Features [B, F] of images [B, C, H, W], a batch at a time."""
    return torch.cat([extractor(batch) for batch in images.split(batch_size)]).float()
