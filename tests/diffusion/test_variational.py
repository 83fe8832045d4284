import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch.distributions import Normal, kl_divergence

from stagepatch.diffusion.variational import Posterior, discretized_gaussian_log_likelihood, gaussian_kl

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def without_noise(monkeypatch):
    """DDPMScheduler.step returns the mean of the posterior."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))


def make(schedule):
    """A scheduler whose steps go straight from x_start and x_t to x_{t−1}, in float64.

    In float32 it is itself off by a few percent at the first timesteps, where 1 − ᾱ loses digits.
    """
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type="sample", clip_sample=False)
    scheduler.alphas_cumprod = (1.0 - scheduler.betas.double()).cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def test_gaussian_kl_equals_torch_distributions_and_of_equals_is_zero():
    mean1, log_variance1, mean2, log_variance2 = (draw(1000, seed=seed) for seed in range(4))
    expected = kl_divergence(Normal(mean1, (log_variance1 / 2).exp()), Normal(mean2, (log_variance2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean1, log_variance1, mean2, log_variance2), expected)
    assert gaussian_kl(mean1, log_variance1, mean1, log_variance1).abs().max() == 0


BINS = torch.linspace(-1.0, 1.0, 256, dtype=torch.float64)


def bins_likelihood(mean, std):
    return discretized_gaussian_log_likelihood(BINS, mean, torch.tensor(2 * math.log(std), dtype=torch.float64))


@pytest.mark.parametrize("mean", [-2.0, -0.7, 0.0, 0.31, 1.0])
@pytest.mark.parametrize("std", [0.02, 0.3, 2.0])
def test_likelihood_sums_to_one_over_the_bins(mean, std):
    likelihood = bins_likelihood(torch.tensor(mean, dtype=torch.float64), std)
    assert likelihood.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("mean", [-0.7, 0.0, 0.31])
@pytest.mark.parametrize("std", [0.05, 0.3, 2.0])
def test_likelihood_equals_differences_of_the_normal_cdf(mean, std):
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    edges = (BINS[1:] + BINS[:-1]) / 2
    below = torch.cat([torch.zeros(1), normal.cdf(edges), torch.ones(1)]).double()
    expected = below.diff().clamp_min(1e-12).log()
    likelihood = bins_likelihood(normal.mean, std)
    # both subtract numbers near 1, so compare where the probability is above their rounding
    certain = expected > math.log(1e-9)
    assert certain.sum() > 20
    torch.testing.assert_close(likelihood[certain], expected[certain], atol=1e-6, rtol=1e-6)


def test_likelihood_of_the_impossible_is_finite():
    likelihood = discretized_gaussian_log_likelihood(torch.tensor(0.0), torch.tensor(5.0), torch.tensor(-20.0))
    assert likelihood.item() == pytest.approx(math.log(1e-12))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timestep", [0, 1, 10, 500, 998])
def test_posterior_mean_equals_a_ddpm_step_without_noise(schedule, timestep):
    scheduler = make(schedule)
    x_start, x_t = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    expected = scheduler.step(x_start, timestep, x_t).prev_sample
    mean = Posterior(scheduler.betas).mean(x_start, x_t, torch.tensor([timestep] * 2))
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timestep", [1, 10, 500, 998])
def test_learned_variance_equals_ddpms_learned_range(schedule, timestep):
    scheduler = make(schedule)
    interpolation = draw(2, 3, 4, 4)
    expected = scheduler._get_variance(timestep, interpolation, "learned_range")
    log_variance = Posterior(scheduler.betas).learned_log_variance(interpolation, torch.tensor([timestep] * 2))
    torch.testing.assert_close(log_variance, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_of_the_learned_range_are_the_two_variances_of_ddpm(schedule):
    scheduler = make(schedule)
    posterior = Posterior(scheduler.betas)
    timesteps = torch.arange(1, 1000)
    ends = (torch.full((999, 1), end) for end in (-1.0, 1.0))
    smallest, largest = (posterior.learned_log_variance(end, timesteps)[:, 0] for end in ends)
    betas = scheduler.betas.double()
    cumulative = (1 - betas).cumprod(0)
    expected = (betas[1:] * (1 - cumulative[:-1]) / (1 - cumulative[1:])).log()
    torch.testing.assert_close(smallest, expected.float(), atol=5e-6, rtol=0)
    torch.testing.assert_close(largest, scheduler.betas[1:].log(), atol=5e-6, rtol=0)


def test_variance_at_zero_is_that_of_the_next_timestep():
    posterior = Posterior(make("linear").betas)
    lowest = posterior.learned_log_variance(torch.full((2, 1), -1.0), torch.tensor([0, 1]))
    assert lowest[0] == lowest[1]
    assert lowest.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timestep", [1, 37, 500, 998])
def test_bound_is_the_kl_between_the_true_and_the_predicted_step(schedule, timestep):
    scheduler = make(schedule)
    x_start, x_t, predicted, interpolation = (draw(2, 3, 4, 4, seed=seed) for seed in range(4))
    interpolation.requires_grad_()

    def step(sample, variance):
        log_variance = scheduler._get_variance(timestep, variance, "learned_range")
        return Normal(scheduler.step(sample, timestep, x_t).prev_sample, (log_variance / 2).exp())

    truth, model = step(x_start, torch.full_like(x_t, -1.0)), step(predicted, interpolation)
    expected = kl_divergence(truth, model).flatten(1).mean(1) / math.log(2)
    timesteps = torch.tensor([timestep] * 2)
    bound = Posterior(scheduler.betas).bound(x_start, x_t, timesteps, predicted, interpolation)
    torch.testing.assert_close(bound, expected, atol=1e-9, rtol=1e-4)
    (gradient,) = torch.autograd.grad(bound.sum(), interpolation)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), interpolation)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-9, rtol=1e-3)


def test_bound_at_zero_is_the_likelihood_of_the_bin():
    scheduler = make("linear")
    x_start = BINS[torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))]
    predicted = x_start + 0.01 * draw(2, 3, 4, 4)
    x_t, interpolation = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    posterior = Posterior(scheduler.betas)
    timesteps = torch.tensor([0, 0])
    mean = scheduler.step(predicted, 0, x_t).prev_sample
    std = (posterior.learned_log_variance(interpolation, timesteps) / 2).exp()
    upper, lower = (Normal(mean, std).cdf(x_start + half) for half in (1 / 255, -1 / 255))
    upper, lower = upper.where(x_start < 0.999, 1.0), lower.where(x_start > -0.999, 0.0)
    expected = -(upper - lower).log().flatten(1).mean(1) / math.log(2)
    bound = posterior.bound(x_start, x_t, timesteps, predicted, interpolation)
    torch.testing.assert_close(bound, expected, atol=0, rtol=1e-6)


def test_bound_scores_each_sample_by_its_own_timestep():
    posterior = Posterior(make("linear").betas)
    tensors = [draw(3, 1, 4, 4, seed=seed) for seed in range(4)]
    timesteps = torch.tensor([0, 1, 700])
    together = posterior.bound(tensors[0], tensors[1], timesteps, tensors[2], tensors[3])
    for index in range(3):
        x_start, x_t, predicted, interpolation = (tensor[index : index + 1] for tensor in tensors)
        alone = posterior.bound(x_start, x_t, timesteps[index : index + 1], predicted, interpolation)
        torch.testing.assert_close(together[index], alone[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bound_holds_in_float32(schedule):
    posterior = Posterior(make(schedule).betas)
    timesteps = torch.tensor([0, 1, 10, 250, 500, 750])
    tensors = [draw(6, 3, 4, 4, seed=seed) for seed in range(4)]

    def bound(x_start, x_t, predicted, interpolation):
        return posterior.bound(x_start, x_t, timesteps, x_start + 0.01 * predicted, interpolation.tanh())

    single = bound(*(tensor.float() for tensor in tensors))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), bound(*tensors), atol=1e-6, rtol=1e-3)


def test_bound_of_a_perfect_prediction_is_zero():
    posterior = Posterior(make("linear").betas)
    x_start, x_t = draw(4, 1, 4, 4), draw(4, 1, 4, 4, seed=1)
    timesteps = torch.tensor([1, 10, 500, 999])
    bound = posterior.bound(x_start, x_t, timesteps, x_start, torch.full_like(x_t, -1.0))
    assert bound.abs().max() < 1e-6
