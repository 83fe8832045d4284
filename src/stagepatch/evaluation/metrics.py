"""The table of metrics, and their functions, by torchmetrics where it has them."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from stagepatch.sampling import spread

NEIGHBOURS = 10_000
Reference = Literal["train", "held_out", "unseen", "second", "pixels"]


class _PrecomputedFeatures(nn.Identity):
    """Stands where torchmetrics expects an extractor."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance (arXiv 1706.08500) of Gaussians fitted to features [B, F] and reference [R, F]."""
    extractor = _PrecomputedFeatures(features.shape[1])
    metric = FrechetInceptionDistance(feature=extractor, normalize=False).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kid(features: Tensor, reference: Tensor, subsets: int = 50) -> float:
    """Kernel distance (arXiv 1801.01401): unbiased, cubic kernel, mean over random subsets, always the same."""
    size = min(len(features), len(reference), 500)
    extractor = _PrecomputedFeatures(features.shape[1])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which is so for any KID
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=extractor, subsets=subsets, subset_size=size)
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        return float(metric.compute()[0])


def precision(features: Tensor, reference: Tensor, k: int = 3, rows: int = 1024) -> float:
    """Share of samples within the k-th-neighbour radius of some reference (arXiv 1904.06991, Eq. 1, 2).

    Of more than NEIGHBOURS samples or references, so many spread evenly over them stand for all: the distances grow
    with the product of the two, and the radii, so the values too, with how many there are.
    """
    features, reference = _at_most(NEIGHBOURS, features).double(), _at_most(NEIGHBOURS, reference).double()
    # The nearest of all is the point itself.
    parts = [torch.cdist(part, reference).kthvalue(k + 1, dim=1).values for part in reference.split(rows)]
    radii = torch.cat(parts)
    inside = [(torch.cdist(part, reference) <= radii).any(dim=1) for part in features.split(rows)]
    return float(torch.cat(inside).double().mean())


def _at_most(count: int, features: Tensor) -> Tensor:
    return features if len(features) <= count else features[spread(len(features), count)]


def recall(features: Tensor, reference: Tensor, k: int = 3) -> float:
    """Share of the reference within the k-th-neighbour radius of some sample; see `precision`."""
    return precision(reference, features, k)


def nearest_distance(images: Tensor, reference: Tensor, rows: int = 1024) -> Tensor:
    """Euclidean distance in pixel values of each image to the nearest reference image: [B]."""
    flat = reference.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).amin(dim=1) for part in images.split(rows)])


def median_nearest_distance(images: Tensor, reference: Tensor) -> float:
    """Median of `nearest_distance`."""
    return float(nearest_distance(images, reference).median())


@dataclass(frozen=True)
class Metric:
    """One number of a set of samples.

    Args:
        label: in tables; '{features}' stands for the extractor's name.
        function: samples and reference to the number.
        reference: what the function takes: features of the samples and of the 'train'ing images, of the 'held_out'
            ones, or of the 'unseen', which are held out where there are any, else training images, in the evaluator's
            features or, of the same images, in its 'second' ones; or the 'pixels' of the samples and of the training
            images, [B, C, H, W] in [−1, 1]. Where there are no held-out images, or the training images are not in
            memory, the metric is left out.
        better: which of two values is the better one.
    """

    label: str
    function: Callable[[Tensor, Tensor], float]
    reference: Reference
    better: Literal["lower", "higher"] = "lower"

    @property
    def sign(self) -> float:
        """1 or −1: sign · value is to be low."""
        return 1.0 if self.better == "lower" else -1.0


# By key, in the order of tables; a new metric is an entry here.
METRICS = {
    "fid_train": Metric("FID ({features}), training images", fid, "train"),
    "fid_held_out": Metric("FID ({features}), held-out images", fid, "held_out"),
    "fid_second": Metric("FID (second features)", fid, "second"),
    "kid": Metric("KID ({features})", kid, "unseen"),
    "precision": Metric("precision", precision, "unseen", "higher"),
    "recall": Metric("recall", recall, "unseen", "higher"),
    "nearest_train": Metric("distance to nearest training image, median", median_nearest_distance, "pixels"),
}


def metric_names(features: str) -> dict[str, str]:
    """How each key is called in tables, given the extractor's name."""
    return {key: metric.label.format(features=features) for key, metric in METRICS.items()}


def direction_note(keys: Collection[str]) -> str:
    """Which values of metrics are the better ones: 'Lower is better.', or by name where they differ."""
    higher = [METRICS[key].label for key in keys if METRICS[key].better == "higher"]
    if len(higher) == len(keys):
        return "Higher is better."
    return f"Lower is better; of {' and '.join(higher)}, higher." if higher else "Lower is better."
