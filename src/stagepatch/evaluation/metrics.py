"""The table of metrics, and their functions, by torchmetrics where it has them."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from stagepatch.evaluation.statistics import Statistics, frechet_distance
from stagepatch.sampling import spread

NEIGHBOURS = 10_000
Split = Literal["train", "held_out", "unseen"]
Collected = Tensor | Statistics


class _PrecomputedFeatures(nn.Identity):
    """Stands where torchmetrics expects an extractor."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def fid(features: Collected, reference: Collected) -> float:
    """Fréchet distance (arXiv 1706.08500) of features [B, F] and reference [R, F], or of the statistics of either.

    Raises:
        UserError: of different F, or features that are no numbers.
    """
    one, other = (of if isinstance(of, Statistics) else Statistics.of(of) for of in (features, reference))
    return frechet_distance(one, other)


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


def median(values: Tensor) -> float:
    """Median of a number an image, [B]; of two in the middle the lower one."""
    return float(values.median())


@dataclass(frozen=True)
class Metric:
    """One number of a set of samples.

    Args:
        label: in tables; '{features}' stands for the extractor's name.
        function: of the samples, then of each reference, to the number. It takes what was collected of the images,
            by default the extractor's features [B, F], not the images.
        reference: the images that it compares with: the 'train'ing ones, the 'held_out' ones, the 'unseen', which are
            held out where there are any, else training images; several, or none. Where there are none of them, the
            metric is left out.
        better: which of two values is the better one.
        of: what is collected of samples and references, see `Evaluator.collect`. Where it cannot be had, the metric is
            left out.
        moments: whether mean and covariance of it are enough: `function` is then given `Statistics`.
        always: whether it is measured where no metrics were named.
    """

    label: str
    function: Callable[..., float]
    reference: Split | tuple[Split, ...] = ()
    better: Literal["lower", "higher"] = "lower"
    of: str = "features"
    moments: bool = False
    always: bool = True

    @property
    def references(self) -> tuple[Split, ...]:
        """`reference` as a tuple."""
        return (self.reference,) if isinstance(self.reference, str) else self.reference

    @property
    def sign(self) -> float:
        """1 or −1: sign · value is to be low."""
        return 1.0 if self.better == "lower" else -1.0


# By key, in the order of tables; a new metric is an entry here.
METRICS = {
    "fid_train": Metric("FID ({features}), training images", fid, "train", moments=True),
    "fid_held_out": Metric("FID ({features}), held-out images", fid, "held_out", moments=True),
    "fid_second": Metric("FID (second features)", fid, "unseen", of="second", moments=True),
    "kid": Metric("KID ({features})", kid, "unseen"),
    "precision": Metric("precision", precision, "unseen", "higher"),
    "recall": Metric("recall", recall, "unseen", "higher"),
    "nearest_train": Metric("distance to nearest training image, median", median, of="nearest_pixels"),
}


def chosen(keys: Iterable[str] | None) -> dict[str, Metric]:
    """Metrics by key; those that are always measured where `keys` is None."""
    if keys is None:
        return {key: metric for key, metric in METRICS.items() if metric.always}
    return {key: METRICS[key] for key in keys}


def measure_collected(
    samples: Mapping[str, Collected],
    reference: Callable[[Split, Metric], Collected | None],
    keys: Iterable[str] | None = None,
) -> dict[str, float]:
    """Metrics of what was collected of samples; those left out that want something else.

    Args:
        samples: by name, a row an image, or `Statistics` where there is nothing else, as of a file of them.
        reference: what a metric takes of the images of a split, or `Statistics` of it; None where there is none.
        keys: of METRICS; those that are always measured by default.

    Raises:
        UserError: numbers that are none, or samples and reference of different extractors.
    """
    moments: dict[str, Statistics] = {}
    found = {}
    for key, metric in chosen(keys).items():
        given = [samples.get(metric.of), *(reference(split, metric) for split in metric.references)]
        if any(of is None or (isinstance(of, Statistics) and not metric.moments) for of in given):
            continue
        if metric.moments and isinstance(given[0], Tensor):  # once for all metrics of them
            moments.setdefault(metric.of, Statistics.of(given[0]))
            given[0] = moments[metric.of]
        found[key] = metric.function(*given)
    return found


def metric_names(features: str) -> dict[str, str]:
    """How each key is called in tables, given the extractor's name."""
    return {key: metric.label.format(features=features) for key, metric in METRICS.items()}


def direction_note(keys: Collection[str]) -> str:
    """Which values of metrics are the better ones: 'Lower is better.', or by name where they differ."""
    higher = [METRICS[key].label for key in keys if METRICS[key].better == "higher"]
    if len(higher) == len(keys):
        return "Higher is better."
    return f"Lower is better; of {' and '.join(higher)}, higher." if higher else "Lower is better."
