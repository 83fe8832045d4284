"""How alike generated samples are to each other: structural bias (DMP, arXiv 2405.17825, Table 5)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from stagepatch.analysis.result import Analysis, signed
from stagepatch.core import UserError
from stagepatch.report import Comparison, Table

_BINS = 120


@dataclass
class PairStatistics:
    """Over the pairs of two different samples; `std` is the population's."""

    max: float
    min: float
    mean: float
    std: float


def correlation_matrix(samples: Tensor) -> Tensor:
    """Pearson correlation of every two samples [S, ...] over their dimensions: [S, S], in float64.

    NaN where a sample is constant.
    """
    return torch.corrcoef(samples.flatten(1).double())


def cosine_matrix(samples: Tensor) -> Tensor:
    """Cosine of every two samples [S, ...] over their dimensions: [S, S], in float64."""
    unit = F.normalize(samples.flatten(1).double(), dim=1)
    return unit @ unit.T


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries of two different samples, each pair once: [S, S] -> [S·(S − 1)/2].

    Raises:
        UserError: fewer than two samples.
    """
    if len(matrix) < 2:
        raise UserError(f"{len(matrix)} samples make no pair to compare: take two or more.")
    above = torch.triu_indices(len(matrix), len(matrix), 1)
    return matrix[above[0], above[1]]


def pair_statistics(matrix: Tensor) -> PairStatistics:
    """Of a symmetric matrix [S, S], off its diagonal (Table 5)."""
    pairs = off_diagonal(matrix)
    return PairStatistics(float(pairs.max()), float(pairs.min()), float(pairs.mean()), float(pairs.std(correction=0)))


def analyze_structure(samples: Mapping[str, Tensor], kind: str) -> Analysis:
    """Correlation and cosine between the samples of each model, which started from the same noise.

    Args:
        samples: [S, C, H, W] by the model's name.
        kind: what they are: 'latents' or 'images'.
    """
    measures = {"correlation": correlation_matrix, "cosine": cosine_matrix}
    pairs: dict[str, dict[str, Tensor]] = {measure: {} for measure in measures}
    numbers: dict[str, dict[str, dict[str, float]]] = {name: {} for name in samples}
    rows = []
    for name, values in samples.items():
        for measure, function in measures.items():
            matrix = function(values)
            pairs[measure][name] = off_diagonal(matrix)
            found = numbers[name][measure] = asdict(pair_statistics(matrix))
            cells = [signed(found[key], 4) for key in ("max", "min", "mean")]
            rows.append([name, measure, *cells, f"{found['std']:.4f}"])
    count = len(next(iter(samples.values())))
    note = (
        f"Over all pairs of {count} generated {kind}, from the same noise and conditions for each model; std of the "
        f"population. The paper (arXiv 2405.17825, Table 5; 1,000 latents): correlation max .7064, min −.4424, mean "
        f".1715, std .1172 for the base, and .7285, −.4770, .1410, .1202 with DMP."
    )
    return Analysis(
        "structural_bias",
        "Structural bias",
        {"samples": count, "of": kind, **numbers},
        _plot_pairs(pairs),
        f"How alike two generated {kind} are: share of the pairs by their correlation and by their cosine.",
        [Table("Likeness between samples", ["model", "measure", "max", "min", "mean", "std"], rows, note)],
        [],
        samples=_comparisons(samples, kind),
    )


def _comparisons(samples: Mapping[str, Tensor], kind: str) -> list[Comparison]:
    """Of each further model's samples over the first one's."""
    (base, first), *others = samples.items()
    shown = "; latents as they are, not decoded, of more than three channels the first three" * (kind == "latents")
    return [
        Comparison.of_samples(
            f"Samples: {name}",
            first,
            own,
            (base, name),
            f"Equal places are from the same noise: {base} left of the slider, {name} right of it{shown}.",
        )
        for name, own in others
    ]


def _plot_pairs(pairs: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """A histogram for each measure, a line a model."""
    figure = Figure(figsize=(6.2 * len(pairs), 3.4), layout="constrained")
    for column, (measure, by_model) in enumerate(pairs.items(), 1):
        axes = figure.add_subplot(1, len(pairs), column)
        finite = {name: values[values.isfinite()].numpy() for name, values in by_model.items()}
        span = min((float(values.min()) for values in finite.values() if len(values)), default=-1.0), 1.0
        for place, (name, values) in enumerate(finite.items()):
            color = f"C{place - 1}" if place else "black"
            axes.hist(values, bins=_BINS, range=span, density=True, histtype="step", label=name, color=color)
        axes.set_xlabel(f"{measure} of two samples")
        axes.set_ylabel("density of pairs")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure
