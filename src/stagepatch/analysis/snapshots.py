"""Similarity of the timesteps' gradients over a run, by its snapshots (DeMe, arXiv 2410.06664, Fig. 1a)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.analysis.config import AnalyzeConfig
from stagepatch.analysis.gradients import GradientSimilarity, gradient_similarity, near_and_far
from stagepatch.analysis.losses import load_other
from stagepatch.analysis.result import Analysis, signed
from stagepatch.analysis.samples import Samples
from stagepatch.core import UserError
from stagepatch.diffusion import Objective
from stagepatch.report import Table, similarity_heatmaps

_QUARTER = 4


def find_snapshots(run: Path) -> dict[int, Path]:
    """A run's snapshots by iteration, in order.

    Raises:
        UserError: it has none.
    """
    found = {int(path.name): path for path in run.glob("snapshots/*") if path.name.isdecimal()}
    if not found:
        raise UserError(f"'{run}' has no snapshots: train it with --training.snapshot_every above 0.")
    return dict(sorted(found.items()))


def mean_cosine(matrix: Tensor, count: int) -> float:
    """Mean over the pairs of the first `count` timesteps of [n, n]."""
    above = torch.triu_indices(count, count, 1)
    return float(matrix[above[0], above[1]].mean())


def analyze_snapshots(config: AnalyzeConfig, objective: Objective, samples: Samples) -> Analysis:
    """`gradient_similarity` of every snapshot of the config's run, from the same samples.

    Raises:
        UserError: no snapshots, or one that is of another model or objective than the config's.
    """
    options = (config.parameters, config.projection, config.memory_gib)
    found = {
        iteration: gradient_similarity(load_other(config.model, path, objective), objective, samples, *options)
        for iteration, path in find_snapshots(Path(config.snapshots)).items()
    }
    timesteps, quarter = list(samples.timesteps), max(2, len(samples.timesteps) // _QUARTER)
    by_iteration = {iteration: _summary(each, quarter) for iteration, each in found.items()}
    mean = torch.stack([each.cosine for each in found.values()]).mean(dim=0)
    panels = {f"iteration {iteration:,}": found[iteration].cosine for iteration in sorted({min(found), max(found)})}
    panels[f"mean of {len(found)} snapshots"] = mean
    names = ["neighbours", "far", "all", "first_quarter", "lowest"]
    rows = [[f"{iteration:,}", *(signed(each[name]) for name in names)] for iteration, each in by_iteration.items()]
    rows = [[*row, f"{each['standard_error']:.3f}"] for row, each in zip(rows, by_iteration.values(), strict=True)]
    columns = ["iteration", "neighbours", "half of T or more apart", "all pairs", f"t ≤ {timesteps[quarter - 1]}"]
    note = (
        f"Cosine between the mean gradients of two timesteps, {samples.count} samples each, the same at every "
        f"snapshot. The paper (arXiv 2410.06664, Fig. 1a) shows all pairs beside those of the first quarter."
    )
    return Analysis(
        "snapshots",
        "Similarity of gradients over a run",
        {"timesteps": timesteps, "samples": samples.count, "mean": mean, "iterations": by_iteration},
        similarity_heatmaps(panels, [str(timestep) for timestep in timesteps], "timestep"),
        "Cosine between the mean gradients of two timesteps, as drawn: noise pulls it to zero.",
        [Table("Cosine between gradients over a run", [*columns, "lowest", "standard error"], rows, note)],
        [],
    )


def _summary(found: GradientSimilarity, quarter: int) -> Mapping[str, Any]:
    """In a few numbers: a matrix of 1,000 timesteps at each of ten snapshots is no file to read."""
    near, far, place = near_and_far(found.cosine)
    return {
        "neighbours": near,
        "far": far,
        "all": mean_cosine(found.cosine, len(found.timesteps)),
        "first_quarter": mean_cosine(found.cosine, quarter),
        "lowest": float(found.cosine[place]),
        "standard_error": found.error,
        "reliability": found.reliability,
        "norms": found.norms,
    }
