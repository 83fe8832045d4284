"""Pairwise similarity of the timesteps' gradients (DeMe, arXiv 2410.06664, Fig. 1a)."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.analysis.config import AnalyzeConfig
from stagepatch.analysis.result import Analysis, signed
from stagepatch.analysis.samples import Samples
from stagepatch.core import UserError, as_user_error, generator_for
from stagepatch.diffusion import Objective
from stagepatch.report import Table, similarity_heatmaps
from stagepatch.training import sample_losses

_SKETCH = 102  # first part of the seed
_PIECE = 2**20
_BYTES = 4  # of a stored number, float32
_RELIABILITY = (
    "Reliability: what the halves of the samples agree on, as a share; the cosine to expect between two such "
    "gradients of the same timestep."
)
LEAST_RELIABILITY = 0.5  # with less, a mean gradient is noise for the greater part, and no cosine of it is corrected


@dataclass
class GradientSimilarity:
    """Cosines between mean gradients, and how far they can be trusted.

    A mean over samples is the true mean gradient plus noise, which draws every cosine towards 0. So each timestep's
    samples are two halves, drawn independently: what the halves of one timestep agree on is no noise.

    Args:
        cosine: between the mean gradients of all samples, [n, n].
        reliability: <a, b> / |g|² of the halves' means a and b and the whole's g: the cosine to expect between two
            such g of the same timestep, [n]. For halves of equal norm it is 2r / (1 + r) of their cosine r (Spearman
            and Brown, 1910).
        corrected: cosine / √(reliability · reliability), an estimate for endless samples (Spearman, 1904), [n, n]; it
            can pass ±1, and is NaN where a reliability is below ½.
        norms: |g|, [n].
        error: standard error of a cosine from the draw of samples, root mean square over pairs of timesteps. It is
            that of the halves' cosines, which differ by √2 of it: the whole's is the same where noise prevails, and
            down to 1/√2 of it where it does not.
        num_parameters: weights that the gradients are of.
    """

    timesteps: list[int]
    cosine: Tensor
    reliability: Tensor
    corrected: Tensor
    norms: Tensor
    error: float
    num_parameters: int


def gradient_similarity(
    model: nn.Module,
    objective: Objective,
    samples: Samples,
    parameters: str = "",
    projection: int = 0,
    memory_gib: float = 4.0,
) -> GradientSimilarity:
    """Mean gradients of the objective at the samples' timesteps [n], compared by cosine.

    Every timestep, and each half of its samples, draws its images and its noise independently: with shared ones, the
    noise that they have in common would pass for similarity.

    Args:
        parameters: regular expression, found anywhere in the names of the weights to take; empty for all.
        projection: numbers k to keep of each gradient, by `count_sketch`; 0 keeps it whole.
        memory_gib: most memory for the 2n gradients that are kept [GiB].

    Raises:
        UserError: no weight has such a name, an odd or too small count, or gradients that take too much memory.
    """
    chosen = _choose(model, parameters)
    if samples.count < 2 or samples.count % 2:
        raise UserError(f"samples={samples.count} must be an even number from 2: halves of them are compared.")
    if projection < 0:
        raise UserError(f"projection={projection} must be above 0, or 0 for whole gradients.")
    total = sum(parameter.numel() for parameter in chosen)
    vectors = _room_for(2 * len(samples.timesteps), total, projection, memory_gib)
    required = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False).eval()
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        for place, timestep in enumerate(samples.timesteps):
            for half in (0, 1):
                for parameter in chosen:
                    parameter.grad = None
                for draws in samples.at(timestep, model, objective, half):
                    (sample_losses(model, objective, draws).sum() / (samples.count // 2)).backward()
                gradient = [torch.zeros_like(value) if value.grad is None else value.grad for value in chosen]
                row = vectors[2 * place + half]
                if projection:
                    row.copy_(count_sketch(gradient, projection, samples.seed))
                else:
                    torch.cat([tensor.flatten().cpu() for tensor in gradient], out=row)
    finally:
        for parameter, before in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(before).grad = None
    return compare_halves(samples.timesteps, gram(vectors), total)


def _choose(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    with as_user_error(f"parameters='{pattern}' is not a regular expression", re.error):
        chosen = {name: value for name, value in model.named_parameters() if re.search(pattern, name)}
    if not chosen:
        names = [name for name, _ in model.named_parameters()]
        raise UserError(
            f"parameters='{pattern}' is in no weight's name. The {len(names)} names go from '{names[0]}' to "
            f"'{names[-1]}'."
        )
    return list(chosen.values())


def _room_for(rows: int, total: int, projection: int, memory_gib: float) -> Tensor:
    """Zeros [rows, weights or projection]."""
    needed = rows * (projection or total) * _BYTES / 2**30
    if needed > memory_gib:
        smaller = "a smaller projection" if projection else "projection=65536 (cosines ± 0.004 at most)"
        raise UserError(
            f"The gradients of {total:,} weights, {rows // 2} timesteps in two halves each, take {needed:.3g} GiB, "
            f"and memory_gib={memory_gib:g}: choose {smaller}, fewer of the weights with "
            f"parameters='<regular expression>', fewer timesteps, or a larger memory_gib."
        )
    return torch.zeros(rows, projection or total)


def count_sketch(tensors: Iterable[Tensor], buckets: int, seed: int) -> Tensor:
    """A vector, given in pieces, as k numbers: each of its numbers is added, with a random sign, to a random one.

    With the same seed for x and y, <Sx, Sy> has the mean <x, y> and the variance
    (|x|²|y|² + <x, y>² − 2 Σ x_i²y_i²) / k, which is at most (|x|²|y|² + <x, y>²) / k (Charikar et al., 2002). A
    cosine c of sketches therefore has, to first order in 1/k, a standard error of at most (1 − c²)/√k.

    Args:
        buckets: k.

    Returns:
        [k] in float64, on the CPU.
    """
    sketch = torch.zeros(buckets, dtype=torch.float64)
    generator = generator_for(torch.device("cpu"), _SKETCH, seed)
    for tensor in tensors:
        for piece in tensor.flatten().split(_PIECE):
            drawn = torch.randint(2 * buckets, (len(piece),), generator=generator)
            signs = (drawn % 2 * 2 - 1).double()
            sketch.index_add_(0, drawn // 2, signs * piece.cpu().double())
    return sketch


def gram(vectors: Tensor) -> Tensor:
    """Inner products of all rows of [n, P], in float64: [n, n]."""
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for piece in vectors.split(_PIECE // len(vectors) + 1, dim=1):
        piece = piece.double()
        products += piece @ piece.T
    return products


def compare_halves(timesteps: Sequence[int], products: Tensor, num_parameters: int) -> GradientSimilarity:
    """From the inner products of all halves [2n, 2n], the halves of a timestep side by side."""
    count = len(timesteps)
    blocks = products.view(count, 2, count, 2)
    whole = blocks.mean(dim=(1, 3))  # <g_i, g_j> of g = (a + b) / 2
    norms = whole.diagonal().sqrt()
    cosine = whole / (norms.unsqueeze(1) * norms)
    reliability = blocks[:, 0, :, 1].diagonal() / whole.diagonal()
    scale = reliability.where(reliability >= LEAST_RELIABILITY, torch.nan).sqrt()
    corrected = cosine / (scale.unsqueeze(1) * scale)
    halves = products / (products.diagonal().sqrt().unsqueeze(1) * products.diagonal().sqrt())
    halves = halves.view(count, 2, count, 2)
    above = torch.triu_indices(count, count, 1)
    apart = (halves[:, 0, :, 0] - halves[:, 1, :, 1])[above[0], above[1]]
    error = float((apart.square() / 2.0).mean().sqrt())
    return GradientSimilarity(list(timesteps), cosine, reliability, corrected, norms, error, num_parameters)


def near_and_far(matrix: Tensor) -> tuple[float, float, tuple[int, int]]:
    """Mean of neighbours, mean of those at least half of all timesteps apart, and the place of the lowest; no NaN."""
    count = len(matrix)
    places = torch.arange(count)
    distance = places - places.unsqueeze(1)
    near = matrix[distance == 1].nanmean()
    far = matrix[distance >= count / 2].nanmean()
    apart = matrix.where(distance > 0, torch.inf).nan_to_num(torch.inf, torch.inf)
    lowest = int(apart.argmin())
    return float(near), float(far), (lowest // count, lowest % count)


def analyze_gradients(config: AnalyzeConfig, model: nn.Module, objective: Objective, samples: Samples) -> Analysis:
    """`gradient_similarity` of the weights that the config names, shown."""
    found = gradient_similarity(model, objective, samples, config.parameters, config.projection, config.memory_gib)
    timesteps, count = found.timesteps, samples.count
    numbers: dict[str, Any] = {"timesteps": timesteps, "samples": count, "weights": found.num_parameters}
    cells = []
    for name, matrix in (("cosine", found.cosine), ("corrected", found.corrected)):
        near, far, place = near_and_far(matrix)
        one, two = (timesteps[index] for index in place)
        lowest = {"timesteps": [one, two], "cosine": float(matrix[place])}
        numbers[name] = {"matrix": matrix, "neighbours": near, "far": far, "lowest": lowest}
        cells.append([signed(near), signed(far), f"{signed(float(matrix[place]))} (t = {one} and {two})"])
    numbers |= {"reliability": found.reliability, "norms": found.norms, "standard_error": found.error}
    if config.projection:
        numbers |= {"projection": config.projection, "projection_error": 1.0 / math.sqrt(config.projection)}
    gap = timesteps[1] - timesteps[0]
    labels = [f"neighbours, {gap} timesteps apart", "at least half of all timesteps apart", "lowest"]
    rows = [list(row) for row in zip(labels, *cells, strict=True)]
    on_diagonal = found.cosine.clone()
    on_diagonal.diagonal().copy_(found.reliability)
    panels = {"cosine; diagonal: reliability": on_diagonal, "corrected for noise": found.corrected}
    each = zip(timesteps, found.norms.tolist(), found.reliability.tolist(), strict=True)
    by_timestep = [[str(timestep), f"{norm:.4g}", f"{reliability:.3f}"] for timestep, norm, reliability in each]
    columns = ["timesteps", "as drawn", "corrected"]
    return Analysis(
        "gradients",
        "Similarity of gradients",
        numbers,
        similarity_heatmaps(panels, [str(timestep) for timestep in timesteps], "timestep"),
        "Cosine between the mean gradients of two timesteps. Where the diagonal of the left panel is pale, a timestep "
        "hardly agrees with itself, and its row says little; on the right, such rows are grey.",
        [Table("Cosine between gradients", columns, rows, _note(found, count, config.projection))],
        [Table("Gradients by timestep", ["timestep", "norm", "reliability"], by_timestep, _RELIABILITY)],
    )


def _note(found: GradientSimilarity, count: int, projection: int) -> str:
    projected = ""
    if projection:
        error = f"(1 − c²)/√{projection} = {1.0 / math.sqrt(projection):.4f}·(1 − c²)"
        projected = f", and from the projection to {projection:,} numbers at most {error}"
    reliable = int((found.reliability >= LEAST_RELIABILITY).sum())
    return (
        f"Mean gradients of {found.num_parameters:,} weights over {count} samples a timestep, images and "
        f"noise drawn anew for each. A cosine's standard error from the draw is some {found.error:.3f} or less (root "
        f"mean square over pairs){projected}. Corrected: an estimate for endless samples, between the {reliable} of "
        f"{len(found.timesteps)} timesteps whose reliability is at least {LEAST_RELIABILITY:g}; more samples make it "
        f"more of them. The paper (arXiv 2410.06664, Fig. 1a): similar between neighbours, low or negative far apart."
    )
