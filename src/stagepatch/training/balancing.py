"""Losses of intervals of timesteps, balanced as those of many tasks (ANT, arXiv 2306.00354)."""

from pathlib import Path

import torch
from torch import Generator, Tensor

from stagepatch.core import UserError, as_user_error, read_json
from stagepatch.diffusion import (
    IntervalSampler,
    Objective,
    cluster_intervals,
    equal_in_t,
    gradient_distances,
    log_snr_distances,
)
from stagepatch.training.balancing_config import BalancingConfig


def make_intervals(config: BalancingConfig, objective: Objective) -> IntervalSampler:
    """What draws timesteps of each interval alike.

    Raises:
        UserError: too many intervals, or no matrix of gradients of the
            objective's timesteps.
    """
    total, count = objective.num_train_timesteps, config.num_intervals
    if config.clustering == "timestep":
        return IntervalSampler(tuple(equal_in_t(total, count)))
    if config.clustering == "snr":
        return IntervalSampler(tuple(cluster_intervals(log_snr_distances(objective.snr(torch.arange(total))), count)))
    cosine = _read_similarity(config.similarity, total)
    edges = [round(place * total / len(cosine)) for place in range(len(cosine) + 1)]
    clustered = cluster_intervals(gradient_distances(cosine), count)
    return IntervalSampler(tuple((edges[first], edges[stop]) for first, stop in clustered))


def _read_similarity(name: str, num_train_timesteps: int) -> Tensor:
    """Cosines of the gradients in the middles of n equal ranges of timesteps, [n, n]."""
    if not name:
        raise UserError(
            "Clustering by gradients needs balancing.similarity, the analysis.json that "
            "'stagepatch analyze --gradients=true' writes."
        )
    with as_user_error(f"'{name}' holds no similarity of gradients", KeyError, TypeError, ValueError):
        found = read_json(Path(name))["gradients"]
        timesteps, cosine = found["timesteps"], torch.tensor(found["cosine"]["matrix"], dtype=torch.float64)
    count = len(timesteps)
    if timesteps != [int((place + 0.5) * num_train_timesteps / count) for place in range(count)]:
        raise UserError(f"'{name}' is of other timesteps than the model's {num_train_timesteps}: analyse this model.")
    return cosine


def uncertainty_weighted(losses: Tensor, log_variances: Tensor) -> Tensor:
    """Σ_i ½ (exp(−s_i) l_i + s_i) of losses l [k] and log-variances s [k] (arXiv 1705.07115, Eq. 10).

    For a loss that stays what it is, the best s_i is log l_i. ANT's released code divides each l_i by k, which moves
    every s_i by log k and changes nothing else.
    """
    return 0.5 * (torch.exp(-log_variances) * losses + log_variances).sum()


def project_conflicts(gradients: Tensor, generator: Generator) -> Tensor:
    """PCGrad (arXiv 2001.06782, Algorithm 1), the mean over tasks: [k, P] -> [P].

    Where the gradient of a task points against another's, its part along that one is taken off; each task meets the
    others in an order that is drawn. The sum of the algorithm is divided by k: without conflicts this is the gradient
    of the mean loss.

    Args:
        generator: on the CPU.
    """
    projected = gradients.clone()
    for number, own in enumerate(projected):
        for other in torch.randperm(len(gradients), generator=generator).tolist():
            if other != number:
                normal = gradients[other]
                against = (own @ normal).clamp_max(0.0) / (normal @ normal).clamp_min(torch.finfo(normal.dtype).tiny)
                own.sub_(against * normal)
    return projected.mean(dim=0)


def bargained(gradients: Tensor) -> Tensor:
    """Nash-MTL (arXiv 2202.01017): the sum of α_i g_i whose weights solve G Gᵀ α = 1/α (Eq. 3), [k, P] -> [P].

    As in the released code, G Gᵀ is divided by its norm first, so what comes out grows as the gradients do. That code
    bounds and repeats a convex approximation. The weights are also where ½ αᵀ G Gᵀ α − Σ log α_i is least, which is
    convex; damped Newton steps go there from anywhere.
    """
    gram = (gradients @ gradients.T).double().cpu()
    gram = gram / gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)
    gram += 1e-8 * torch.eye(len(gram), dtype=gram.dtype)  # gradients may cancel, or be zero: nothing is least then
    weights = torch.ones(len(gram), dtype=gram.dtype)
    for _ in range(500):
        slope = gram @ weights - 1.0 / weights
        step = torch.linalg.solve(gram + torch.diag(weights**-2), slope)
        decrement = (slope @ step).clamp_min(0.0).sqrt()
        weights = weights - step / (1.0 + decrement)
        if decrement < 1e-9:
            break
    return weights.to(gradients) @ gradients
