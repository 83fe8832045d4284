"""The table of metrics, and what each needs."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from stagepatch.core import UserError
from stagepatch.evaluation import kernels, neighbours
from stagepatch.evaluation.extrapolation import fid_infinity
from stagepatch.evaluation.kernels import clip_score, cmmd, inception_score, kid, vendi
from stagepatch.evaluation.neighbours import (
    coverage,
    density,
    median,
    memorised,
    memorised_features,
    precision,
    recall,
)
from stagepatch.evaluation.statistics import Statistics, frechet_distance

Split = Literal["train", "held_out", "unseen", "captions"]
Collected = Tensor | Statistics


def fid(features: Collected, reference: Collected) -> float:
    """Fréchet distance (arXiv 1706.08500) of features [B, F] and reference [R, F], or of the statistics of either.

    Raises:
        UserError: of different F, or features that are no numbers.
    """
    one, other = (of if isinstance(of, Statistics) else Statistics.of(of) for of in (features, reference))
    return frechet_distance(one, other)


@dataclass(frozen=True)
class Metric:
    """One number of a set of samples.

    Args:
        label: in tables; '{features}' stands for the extractor's name.
        function: of the samples, then of each reference, to the number. It takes what was collected of the images,
            by default the extractor's features [B, F], not the images.
        reference: the images that it compares with: the 'train'ing ones, the 'held_out' ones, the 'unseen', which are
            held out where there are any, else training images, the samples' own 'captions'; several, or none. Where
            there are none of them, the metric is left out.
        better: which of two values is the better one.
        of: what is collected of samples and references, see `Evaluator.collect`. Where it cannot be had, the metric is
            left out.
        moments: whether mean and covariance of it are enough: `function` is then given `Statistics`.
        always: whether it is measured where no metrics were named.
        without: of the same and the group of each sample, [B] integers, to the metric without each group: where that
            can be had in less time than by `function`, or where `function` draws lots. See `left_out`.
    """

    label: str
    function: Callable[..., float]
    reference: Split | tuple[Split, ...] = ()
    better: Literal["lower", "higher"] = "lower"
    of: str = "features"
    moments: bool = False
    always: bool = True
    without: Callable[..., list[float]] | None = None

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
    "fid": Metric("FID ({features})", fid, "unseen", moments=True, always=False),
    "fid_train": Metric("FID ({features}), training images", fid, "train", moments=True),
    "fid_held_out": Metric("FID ({features}), held-out images", fid, "held_out", moments=True),
    "fid_second": Metric("FID (second features)", fid, "unseen", of="second", moments=True),
    "fid_infinity": Metric("FID∞ ({features})", fid_infinity, "unseen", always=False),
    "sfid": Metric("sFID ({features})", fid, "unseen", of="spatial", moments=True, always=False),
    "fd_dinov2": Metric("Fréchet distance (DINOv2)", fid, "unseen", of="dinov2", moments=True, always=False),
    "kid": Metric("KID ({features})", kid, "unseen", without=kernels.kid_without),
    "cmmd": Metric("CMMD (CLIP)", cmmd, "unseen", of="clip", always=False, without=kernels.cmmd_without),
    "precision": Metric("precision", precision, "unseen", "higher", without=neighbours.precision_without),
    "recall": Metric("recall", recall, "unseen", "higher", without=neighbours.recall_without),
    "density": Metric("density", density, "unseen", "higher", always=False, without=neighbours.density_without),
    "coverage": Metric("coverage", coverage, "unseen", "higher", always=False, without=neighbours.coverage_without),
    "inception_score": Metric(
        "inception score ({features})", inception_score, (), "higher", of="logits", always=False
    ),
    "vendi": Metric("Vendi score ({features})", vendi, (), "higher", always=False, without=kernels.vendi_without),
    "clip_score": Metric(
        "CLIP score", clip_score, "captions", "higher", of="clip", always=False, without=kernels.clip_score_without
    ),
    "nearest_train": Metric("distance to nearest training image, median", median, of="nearest_pixels"),
    "memorised_pixels": Metric(
        "share near training images (pixels)",
        memorised,
        "held_out",
        of="nearest_pixels",
        always=False,
        without=neighbours.memorised_without,
    ),
    "memorised_features": Metric(
        "share near training images ({features})",
        memorised_features,
        ("train", "held_out"),
        always=False,
        without=neighbours.memorised_features_without,
    ),
}


def chosen(keys: Iterable[str] | None) -> dict[str, Metric]:
    """Metrics by key; those that are always measured where `keys` is None, every one where it holds 'all'.

    Raises:
        UserError: a key that there is not.
    """
    keys = [key for key, metric in METRICS.items() if metric.always] if keys is None else [*keys]
    keys = [*METRICS] if "all" in keys else keys
    for key in keys:
        if key not in METRICS:
            raise UserError(f"There is no metric '{key}'. Choose of: all, {', '.join(METRICS)}.")
    return {key: METRICS[key] for key in keys}


def taken(
    metric: Metric, samples: Mapping[str, Collected], reference: Callable[[Split, Metric], Collected | None]
) -> list[Collected] | None:
    """What a metric's function is given; None where some of it cannot be had. See `measure_collected`."""
    given = [samples.get(metric.of)]
    for split in metric.references:
        given.append(samples.get("captions") if split == "captions" else reference(split, metric))
    found = [each for each in given if isinstance(each, Tensor) or (each is not None and metric.moments)]
    return found if len(found) == len(given) else None


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
        given = taken(metric, samples, reference)
        if given is None:
            continue
        if metric.moments and isinstance(given[0], Tensor):  # once for all metrics of them
            if metric.of not in moments:
                moments[metric.of] = Statistics.of(given[0])
            given[0] = moments[metric.of]
        found[key] = metric.function(*given)
    return found


def metric_names(features: str) -> dict[str, str]:
    """How each key is called in tables, given the extractor's name."""
    return {key: metric.label.format(features=features) for key, metric in METRICS.items()}


def direction_note(keys: Collection[str]) -> str:
    """Which values of metrics are the better ones: 'Lower is better.', or by name where they differ."""
    higher = [METRICS[key].label.replace(" ({features})", "") for key in keys if METRICS[key].better == "higher"]
    if len(higher) == len(keys):
        return "Higher is better."
    *others, last = higher or [""]
    names = f"{', '.join(others)} and {last}" if others else last
    return f"Lower is better; of {names}, higher." if higher else "Lower is better."
