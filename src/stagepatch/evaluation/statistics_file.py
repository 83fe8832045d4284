"""Statistics of features as a `.npz`, in the form of pytorch-fid and ADM: `mu` [F] and `sigma` [F, F].

ADM's reference batches (arXiv 2105.05233) hold `mu_s` and `sigma_s` of sFID's features besides, and some of the images
as `arr_0`. Neither says what extracted the features; those that are written here do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagepatch.core import UserError, as_user_error, write_atomically
from stagepatch.evaluation.features import FeatureExtractor
from stagepatch.evaluation.statistics import Statistics

_ASYMMETRY = 1e-4
_ENDINGS = {"features": "", "spatial": "_s"}


@dataclass
class StatisticsFile:
    """What such a file holds.

    Args:
        statistics: by name, of the 'features' and, where it has them, of the 'spatial' ones; count 0 where it does not
            say.
        extractor, fingerprint, preprocessing: of what extracted them; empty where it does not say.
        source: of the images, as they were named; empty where it does not say.
    """

    statistics: dict[str, Statistics]
    extractor: str = ""
    fingerprint: str = ""
    preprocessing: str = ""
    source: str = ""


def is_statistics(path: Path) -> bool:
    """Whether a file is a .npz with `mu` and `sigma`."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return {"mu", "sigma"} <= {*file.files}
    except Exception:  # numpy's of broken headers are of many kinds
        return False  # who reads its images says what is wrong


def has_images(path: Path) -> bool:
    """Whether a file of statistics holds images too, as ADM's do."""
    with np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files


def read_statistics(path: Path) -> StatisticsFile:
    """The statistics of a .npz; nothing of it is unpickled.

    Raises:
        UserError: it cannot be read, its arrays are not [F] and [F, F], hold NaN, or are no covariance.
    """
    arrays = {}
    with as_user_error(f"Cannot read '{path}'", Exception), np.load(path, allow_pickle=False) as file:
        for name, ending in _ENDINGS.items():
            if f"mu{ending}" in file.files:
                pair = (f"mu{ending}", f"sigma{ending}")
                arrays[name] = [torch.from_numpy(np.array(file[each], np.float64)) for each in pair]
        names = ("extractor", "fingerprint", "preprocessing", "source")
        said = {name: str(file[name]) for name in names if name in file.files}
        count = int(file["count"]) if "count" in file.files else 0
    statistics = {name: _checked(path, _ENDINGS[name], count, *pair) for name, pair in arrays.items()}
    return StatisticsFile(statistics, **said)


def _checked(path: Path, ending: str, count: int, mean: Tensor, covariance: Tensor) -> Statistics:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"'{path}' has 'mu{ending}' {[*mean.shape]} and 'sigma{ending}' {[*covariance.shape]}, not [F] and [F, F]."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"'{path}' holds NaN or infinity, as statistics of a single image do: make it again.")
    scale = float(covariance.diagonal().abs().max()) if len(mean) else 0.0
    is_symmetric = float((covariance - covariance.mT).abs().max()) <= _ASYMMETRY * scale if len(mean) else False
    if not is_symmetric or float(covariance.diagonal().min()) < 0.0:
        raise UserError(f"'sigma{ending}' of '{path}' is no covariance: not symmetric, or with a variance below 0.")
    return Statistics(count, mean, (covariance + covariance.mT) / 2)


def write_statistics(path: Path, file: StatisticsFile) -> None:
    """Write a .npz that pytorch-fid, and what else takes `mu` and `sigma`, reads too.

    Raises:
        UserError: another ending than .npz, or it cannot be written.
    """
    if path.suffix != ".npz":
        raise UserError(f"Statistics are written as .npz: '{path}' ends otherwise.")
    arrays: dict[str, Any] = {
        "count": np.array(file.statistics["features"].count),
        "extractor": np.array(file.extractor),
        "fingerprint": np.array(file.fingerprint),
        "preprocessing": np.array(file.preprocessing),
        "source": np.array(file.source),
    }

    for name, statistics in file.statistics.items():
        arrays[f"mu{_ENDINGS[name]}"] = statistics.mean.numpy()
        arrays[f"sigma{_ENDINGS[name]}"] = statistics.covariance.numpy()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            np.savez(handle, **arrays)

    write_atomically(path, write)


def check_extractor(path: Path, file: StatisticsFile, extractor: FeatureExtractor) -> str:
    """Refuse statistics of another extractor, as far as the file says.

    Returns:
        What is taken on trust, a sentence; empty where the file says all.

    Raises:
        UserError: they are of other weights, another preprocessing, or other dimensions than `num_features`.
    """
    preprocessing = getattr(extractor, "preprocessing", "")
    if file.fingerprint and (file.extractor, file.preprocessing) == (extractor.name, preprocessing):
        if file.fingerprint != extractor.fingerprint:
            raise UserError(f"'{path}' holds statistics of {file.extractor} with other weights: make it again.")
    elif file.fingerprint and file.extractor == extractor.name:
        raise UserError(
            f"'{path}' holds statistics of images that were prepared otherwise ('{file.preprocessing}', here "
            f"'{preprocessing}'): make it again."
        )
    elif file.fingerprint:
        raise UserError(
            f"'{path}' holds statistics of {file.extractor}, not of {extractor.name}: choose its --extractor, or make "
            f"it again."
        )
    dimensions = getattr(extractor, "num_features", None)
    found = len(file.statistics["features"].mean)
    if dimensions and found != dimensions:
        raise UserError(
            f"'{path}' holds statistics of {found:,} features, but {extractor.name} has {dimensions:,}: choose the "
            f"--extractor that it was made with."
        )
    if file.fingerprint:
        return ""
    return f"'{path}' does not say what extracted its features: that it was {extractor.name} is taken on trust."
