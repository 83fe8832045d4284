"""What metrics take of images, in one pass over them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stagepatch.evaluation.features import ClipFeatures, FeatureExtractor, extract_features, extract_outputs


@dataclass
class Collector:
    """Images [B, C, H, W] in [−1, 1], and their captions, to tensors by name, a row an image.

    Args:
        extractor: the one that is chosen.
        outputs: of what it puts out: 'features' [B, F], 'spatial', 'logits'.
        others: further extractors by name, of features that go by it. 'clip' gives the 'captions' too, where they are
            given.
    """

    extractor: FeatureExtractor
    outputs: Sequence[str] = ("features",)
    others: Mapping[str, FeatureExtractor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the tensors, but for the captions'."""
        return [*self.outputs, *self.others]

    @property
    def fingerprint(self) -> str:
        """Changes with what would be collected."""
        if self.names == ["features"]:
            return self.extractor.fingerprint
        others = {name: extractor.fingerprint for name, extractor in self.others.items()}
        return hashlib.sha256(f"{self.extractor.fingerprint} {[*self.outputs]} {others}".encode()).hexdigest()

    def __call__(self, images: Tensor, captions: Sequence[str] = ()) -> dict[str, Tensor]:
        found = extract_outputs(self.extractor, images, self.outputs)
        found |= {name: extract_features(extractor, images) for name, extractor in self.others.items()}
        clip = self.others.get("clip")
        if captions and isinstance(clip, ClipFeatures):
            found["captions"] = clip.of_captions(captions)
        return found
