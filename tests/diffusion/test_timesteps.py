"""Frequencies of drawn timesteps, and where ranges are cut."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from scipy import special, stats

from stagepatch.core.errors import UserError
from stagepatch.diffusion import Objective, ObjectiveConfig, TimestepsConfig, make_scheduler, make_timesteps
from stagepatch.diffusion.timesteps import TimestepSampler, equal_in_log_snr, equal_in_t, split_at

T, FIRST, STOP = 1000, 250, 500
LEVELS = torch.arange(T) / T


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_frequencies_over_a_million_draws(p, antithetic):
    """A χ² test over ten bins inside the range and ten outside."""
    sampler = TimestepSampler(T, FIRST, STOP, p, antithetic)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(sampler.draw(10**6, generator), minlength=T)
    inside = counts[FIRST:STOP].view(10, -1).sum(dim=1)
    outside = torch.cat([counts[:FIRST], counts[STOP:]]).view(10, -1).sum(dim=1)
    share = p * (STOP - FIRST) / T + (1 - p)
    expected = torch.cat([torch.full((10,), share / 10), torch.full((10,), (1 - share) / 10)]) * 10**6
    seen = torch.cat([inside, outside]).double()
    if p == 0.0:
        assert outside.sum() == 0
        seen, expected = seen[:10], expected[:10]
    # Mirrored halves count twice, which doubles the statistic's spread.
    unit = 2 if antithetic else 1
    assert stats.chisquare(seen / unit, expected / unit * (seen.sum() / expected.sum())).pvalue > 1e-3


def test_mirrored_half_stands_opposite():
    sampler = TimestepSampler(T, FIRST, STOP, antithetic=True)
    drawn = sampler.draw(8, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[5:], FIRST + STOP - 1 - drawn[:3])
    everywhere = TimestepSampler(T, FIRST, STOP, p=1.0, antithetic=True).draw(8, torch.Generator().manual_seed(0))
    assert torch.equal(everywhere[5:], T - 1 - everywhere[:3])
    assert len(sampler.draw(7, torch.Generator())) == 7


def test_ranges_of_equal_length_and_given_ones():
    assert equal_in_t(1000, 4) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert equal_in_t(10, 3) == [(0, 3), (3, 7), (7, 10)]
    assert split_at(1000, [100, 600]) == [(0, 100), (100, 600), (600, 1000)]


def test_ranges_of_equal_log_snr():
    alphas = make_scheduler(ObjectiveConfig()).alphas_cumprod
    snr = alphas / (1 - alphas)
    ranges = equal_in_log_snr(snr, 4)
    assert (ranges[0][0], ranges[-1][1]) == (0, 1000)
    falls = [float(snr[first].log() - snr[min(stop, 999)].log()) for first, stop in ranges]
    assert max(falls) / min(falls) < 1.15
    # The linear schedule loses most of its log-SNR in its first steps.
    assert ranges[0][1] - ranges[0][0] < 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimestepSampler(T, 500, 500), "from 500 to 500 is empty"),
        (lambda: TimestepSampler(T, -1, 500), "from -1 to 500"),
        (lambda: TimestepSampler(T, 0, 1001), "from 0 to 1001"),
        (lambda: TimestepSampler(T, 0, 10, p=1.5), "p=1.5 must be a probability"),
        (lambda: equal_in_t(10, 11), "10 timesteps cannot be split into 11"),
        (lambda: split_at(10, [5, 5]), r"boundaries=\[5, 5\] must rise"),
        (lambda: split_at(10, [10]), r"boundaries=\[10\] must rise"),
    ],
)
def test_bad_ranges_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_objective_draws_from_its_sampler():
    scheduler = make_scheduler(ObjectiveConfig())
    objective = Objective(scheduler, timesteps=TimestepSampler(T, FIRST, STOP))
    drawn = objective.draw_timesteps(1000, torch.Generator().manual_seed(0))
    assert FIRST <= drawn.min() <= drawn.max() < STOP
    plain = Objective(scheduler).draw_timesteps(1000, torch.Generator().manual_seed(0))
    assert torch.equal(plain, torch.randint(0, T, (1000,), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_densities_are_those_of_their_distributions(density, bounds):
    """A Kolmogorov–Smirnov test against the distributions of arXiv 2403.03206, Section 3.1, scaled into the range."""
    config = TimestepsConfig(list(bounds), density, logit_mean=-0.5, logit_std=0.8, mode_scale=1.29)
    sampler = make_timesteps(config, torch.arange(10**6).double() / 10**6)
    drawn = sampler.draw(20_000, torch.Generator().manual_seed(0)).double() / 10**6
    low, high = bounds
    assert low <= float(drawn.min()) < float(drawn.max()) < high
    levels = ((drawn - low) / (high - low)).clamp(1e-9, 1 - 1e-9).numpy()
    if density == "logit_normal":
        found = stats.kstest(special.logit(levels), stats.norm(-0.5, 0.8).cdf)
    elif density == "uniform":
        found = stats.kstest(levels, stats.uniform.cdf)
    else:  # the image of uniform u under 1 − u − s·(cos²(πu/2) − 1 + u), which falls in u
        u = np.linspace(1, 0, 10_001)
        image = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        found = stats.kstest(levels, lambda level: 1 - np.interp(level, image, u))
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("bounds", [(0.0, 0.25), (0.25, 0.5), (0.875, 1.0)])
def test_a_range_is_of_what_the_model_is_told_in_a_shifted_flow_too(shift, bounds):
    """As diffusers' own scheduler tells it in sampling: its timesteps over T."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = Objective(scheduler)
    objective.timesteps = make_timesteps(TimestepsConfig(list(bounds)), objective.levels)
    drawn = objective.draw_timesteps(20_000, torch.Generator().manual_seed(0))
    told = set((objective.model_timesteps(drawn) / T).tolist())
    own = (scheduler.timesteps / T).tolist()  # all T of them, as the scheduler was made
    low, high = bounds
    expected = [level for level in own if low - 1e-6 <= level < high - 1e-6 or level == high == 1.0]
    assert len(told) == len(expected)
    torch.testing.assert_close(sorted(told), sorted(expected), rtol=1e-6, atol=1e-6)


def test_a_range_without_a_timestep_is_refused():
    with pytest.raises(UserError, match=r"None of the 10 timesteps has a noise level from 0.41 to 0.45"):
        make_timesteps(TimestepsConfig([0.41, 0.45]), torch.arange(10) / 10)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("density", ["uniform", "cosmap"])
def test_cosmap_and_a_shift_are_those_of_the_paper(density, shift):
    """Against the closed form: CosMap's density is 2/(π − 2πt + 2πt²) (arXiv 2403.03206, Eq. 21), and its integral."""
    config = TimestepsConfig(density=density, shift=shift)
    sampler = make_timesteps(config, torch.arange(10**6).double() / 10**6) if config != TimestepsConfig() else None
    if sampler is None:
        return
    drawn = sampler.draw(20_000, torch.Generator().manual_seed(0)).double().numpy() / 10**6

    def cumulated(level):
        level = level / (shift - (shift - 1) * level)  # before the shift
        return level if density == "uniform" else 2 / np.pi * np.arctan2(level, 1 - level)

    assert stats.kstest(drawn, cumulated).pvalue > 1e-3
    grid = np.linspace(0.01, 0.99, 50)
    if density == "cosmap" and shift == 1.0:
        np.testing.assert_allclose(
            np.gradient(cumulated(grid), grid)[1:-1],
            compute_loss_weighting_for_sd3("cosmap", torch.from_numpy(grid))[1:-1].numpy(),
            rtol=1e-2,
        )


def test_a_flows_own_shift_is_a_shift_of_what_is_drawn():
    """Eq. 23, as diffusers' scheduler has it in its sigmas."""
    config = TimestepsConfig(shift=3.0)
    plain = Objective(FlowMatchEulerDiscreteScheduler(), timesteps=make_timesteps(config, LEVELS))
    drawn = plain.model_timesteps(plain.draw_timesteps(20_000, torch.Generator().manual_seed(0))) / T
    own = Objective(FlowMatchEulerDiscreteScheduler(shift=3.0))
    shifted = own.model_timesteps(own.draw_timesteps(20_000, torch.Generator().manual_seed(1))) / T
    assert stats.ks_2samp(drawn.numpy(), shifted.numpy()).pvalue > 1e-3


def test_all_alike_is_drawn_as_before():
    assert make_timesteps(TimestepsConfig(), LEVELS) is None


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"range": [0.5, 0.5]}, r"range=\[0.5, 0.5\] must be two noise levels"),
        ({"range": [0.5]}, "two noise levels"),
        ({"range": [0.0, 1.5]}, "two noise levels"),
        ({"density": "normal"}, "none of uniform, logit_normal, mode, cosmap"),
        ({"shift": 0.0}, r"shift=0.0 must be above 0"),
        ({"density": "logit_normal", "logit_std": 0.0}, "logit_std=0.0 must be above 0"),
    ],
)
def test_odd_choices_of_timesteps(choice, message):
    with pytest.raises(UserError, match=message):
        make_timesteps(TimestepsConfig(**choice), LEVELS)
