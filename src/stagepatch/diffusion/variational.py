"""The learned-variance bound of improved DDPM (arXiv 2102.09672, Eq. 14–16), in bits per dimension."""

import math

import torch
from torch import Tensor

from stagepatch.diffusion.noise_schedule import at_timesteps


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)) per element, in nats."""
    # Autograd sums gradients in the order of these terms: another order gives other last bits.
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability [nats] of the bin of `x`, of 256 equal bins over [−1, 1], open at both ends.

    As in DDPM (arXiv 2006.11239, Eq. 13).
    """
    half_bin = 1.0 / 255.0
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _normal_cdf((x - mean + half_bin) * inverse_std)
    lower = _normal_cdf((x - mean - half_bin) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return torch.log((upper - lower).clamp_min(1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Posterior:
    """q(x_{t−1} | x_t, x_0), its mean and variance for every t (arXiv 2006.11239, Eq. 7)."""

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        previous = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])
        variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
        # The variance at t = 0 is 0; its logarithm is taken from t = 1, as in improved DDPM.
        self.log_variance = torch.log(torch.cat([variance[1:2], variance[1:]])).float()
        self.log_betas = torch.log(betas).float()
        self.coefficient_x_start = (betas * previous.sqrt() / (1.0 - alphas_cumprod)).float()
        self.coefficient_x_t = ((1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod)).float()

    def mean(self, x_start: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """[B, C, H, W]"""
        of_x_t = at_timesteps(self.coefficient_x_t, timesteps, x_t)
        return at_timesteps(self.coefficient_x_start, timesteps, x_t) * x_start + of_x_t * x_t

    def learned_log_variance(self, interpolation: Tensor, timesteps: Tensor) -> Tensor:
        """The model's log-variance from its output in [−1, 1] (arXiv 2102.09672, Eq. 15)."""
        smallest = at_timesteps(self.log_variance, timesteps, interpolation)
        largest = at_timesteps(self.log_betas, timesteps, interpolation)
        fraction = (interpolation + 1.0) / 2.0
        return fraction * largest + (1.0 - fraction) * smallest

    def bound(
        self,
        x_start: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        predicted_x_start: Tensor,
        interpolation: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The term L_t of the variational bound per sample, mean over dimensions, in bits: [B].

        Args:
            x_start, x_t, predicted_x_start, interpolation: [B, C, H, W].
            timesteps: [B]; t = 0 is scored by the discretised log-likelihood, the others by the KL.
            weights: of each place, [B, 1, H, W].
        """
        mean = self.mean(predicted_x_start, x_t, timesteps)
        log_variance = self.learned_log_variance(interpolation, timesteps)
        true_mean = self.mean(x_start, x_t, timesteps)
        true_log_variance = at_timesteps(self.log_variance, timesteps, x_t).expand_as(x_t)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        likelihood = -discretized_gaussian_log_likelihood(x_start, mean, log_variance)
        first = (timesteps == 0).view(-1, *[1] * (x_t.ndim - 1))
        terms = torch.where(first, likelihood, kl)
        terms = terms if weights is None else terms * weights
        return terms.flatten(1).mean(dim=1) / math.log(2.0)
