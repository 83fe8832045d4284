from unittest.mock import Mock

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import chisquare
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.diffusion import Objective

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])
DIFFUSION = ["epsilon", "v_prediction", "sample"]
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
DDPM = [DDPMScheduler(beta_schedule=schedule, prediction_type=kind) for schedule in SCHEDULES for kind in DIFFUSION]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def x_start():
    return draw(6, 2, 4, 4).clamp(-1, 1)


@pytest.fixture
def noise():
    return draw(6, 2, 4, 4, seed=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_sample_and_velocity_equal_ddpm(schedule, x_start, noise):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type="v_prediction")
    objective = Objective(scheduler)
    x_t = objective.add_noise(x_start, noise, TIMESTEPS)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_start, noise, TIMESTEPS), atol=1e-6, rtol=1e-6)
    velocity = objective.target(x_start, noise, TIMESTEPS)
    expected = scheduler.get_velocity(x_start, noise, TIMESTEPS)
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_implied_x_start_equals_ddpm(schedule, prediction_type, x_start, noise):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    prediction, x_t = noise, x_start
    for index, timestep in enumerate([0, 1, 250, 500, 900]):
        expected = scheduler.step(prediction[:1], timestep, x_t[:1]).pred_original_sample
        implied = Objective(scheduler).predict_x_start(prediction[:1], x_t[:1], torch.tensor([timestep]))
        torch.testing.assert_close(implied, expected, atol=1e-5, rtol=1e-4, msg=str(index))


def test_targets_are_what_they_are_called(x_start, noise):
    for prediction_type, expected in (("epsilon", noise), ("sample", x_start)):
        objective = Objective(DDPMScheduler(prediction_type=prediction_type))
        assert torch.equal(objective.target(x_start, noise, TIMESTEPS), expected)


@pytest.mark.parametrize("scheduler", [*DDPM, *(FlowMatchEulerDiscreteScheduler(shift=shift) for shift in (1.0, 3.0))])
def test_target_implies_exactly_x_start(scheduler, x_start, noise):
    objective = Objective(scheduler)
    x_start, noise = x_start.double(), noise.double()
    x_t = objective.add_noise(x_start, noise, TIMESTEPS)
    implied = objective.predict_x_start(objective.target(x_start, noise, TIMESTEPS), x_t, TIMESTEPS)
    torch.testing.assert_close(implied, x_start, atol=1e-12 if objective.is_flow else 1e-10, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noisy_sample_equals_scale_noise(shift, x_start, noise):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = Objective(scheduler)
    times = objective.model_timesteps(TIMESTEPS)
    torch.testing.assert_close(times, scheduler.timesteps[999 - TIMESTEPS], rtol=1e-6, atol=1e-5)
    expected = scheduler.scale_noise(x_start, scheduler.timesteps[999 - TIMESTEPS], noise)
    torch.testing.assert_close(objective.add_noise(x_start, noise, TIMESTEPS), expected, atol=1e-6, rtol=1e-6)


def test_flow_target_leads_diffusers_sampler_to_x_start(x_start, noise):
    scheduler = FlowMatchEulerDiscreteScheduler()
    target = Objective(scheduler).target(x_start, noise, TIMESTEPS)
    scheduler.set_timesteps(7)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(target, timestep, sample).prev_sample
    torch.testing.assert_close(sample, x_start, atol=1e-5, rtol=1e-5)


def test_models_of_diffusion_take_the_timestep_itself():
    assert torch.equal(Objective(DDPMScheduler()).model_timesteps(TIMESTEPS), TIMESTEPS)


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampled", [False, True])
def test_any_scheduler_trains_as_ddpm_does(name, prediction_type, sampled, x_start, noise):
    # Published pipelines carry a sampler's scheduler, whose own add_noise may be scaled for sampling.
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type=prediction_type)
    if sampled:
        scheduler.set_timesteps(10)
    objective, reference = Objective(scheduler), DDPMScheduler()
    x_t = objective.add_noise(x_start, noise, TIMESTEPS)
    torch.testing.assert_close(x_t, reference.add_noise(x_start, noise, TIMESTEPS), atol=1e-6, rtol=1e-6)
    expected = noise if prediction_type == "epsilon" else reference.get_velocity(x_start, noise, TIMESTEPS)
    torch.testing.assert_close(objective.target(x_start, noise, TIMESTEPS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_sampling_with_the_same_flow_scheduler_changes_nothing(before, x_start, noise):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    expected = Objective(scheduler).add_noise(x_start, noise, TIMESTEPS)
    if before:
        scheduler.set_timesteps(10)
    objective = Objective(scheduler)
    scheduler.set_timesteps(10)
    assert torch.equal(objective.add_noise(x_start, noise, TIMESTEPS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_noise_of_the_first_timesteps(dtype, x_start, noise):
    # 1 − ᾱ of t = 0 is 1e-4: taken in bfloat16 it is 0.
    objective = Objective(DDPMScheduler())
    nothing = torch.zeros_like(x_start)
    expected = objective.add_noise(nothing, noise, TIMESTEPS)
    rounded = objective.add_noise(nothing.to(dtype), noise.to(dtype), TIMESTEPS)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), expected, atol=1e-5, rtol=2e-2)


def test_timesteps_are_uniform_and_reach_both_ends():
    objective = Objective(DDPMScheduler(num_train_timesteps=100))
    timesteps = objective.draw_timesteps(200_000, torch.Generator().manual_seed(0))
    counts = timesteps.bincount(minlength=100)
    assert (timesteps.min().item(), timesteps.max().item(), len(counts)) == (0, 99, 100)
    assert chisquare(counts.numpy()).pvalue > 0.001


def test_timesteps_repeat_with_the_generators_seed():
    objective = Objective(DDPMScheduler())
    one, same, other = (objective.draw_timesteps(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "scheduler", [*(DDPMScheduler(prediction_type=kind) for kind in DIFFUSION), FlowMatchEulerDiscreteScheduler()]
)
def test_loss_is_each_samples_mean_squared_error(scheduler, x_start, noise):
    objective = Objective(scheduler)
    output = draw(6, 2, 4, 4, seed=2)
    target = noise - x_start if objective.is_flow else objective.target(x_start, noise, TIMESTEPS)
    expected = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(output, x_start, noise, TIMESTEPS), expected)


def test_perfect_prediction_has_no_loss_and_loss_is_taken_in_float32(x_start, noise):
    objective = Objective(DDPMScheduler())
    assert objective.loss(noise, x_start, noise, TIMESTEPS).abs().max() == 0
    assert objective.loss(noise.bfloat16(), x_start, noise, TIMESTEPS).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_bound_trains_the_interpolation_and_leaves_the_prediction_to_the_error(prediction_type, x_start, noise):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    prediction = draw(6, 2, 4, 4, seed=2).requires_grad_()
    interpolation = draw(6, 2, 4, 4, seed=3).requires_grad_()
    learned = Objective(scheduler, learn_sigma=True)
    loss = learned.loss(torch.cat([prediction, interpolation], dim=1), x_start, noise, TIMESTEPS)
    gradient, variance_gradient = torch.autograd.grad(loss.sum(), [prediction, interpolation])
    target = learned.target(x_start, noise, TIMESTEPS)
    plain = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    (plain_gradient,) = torch.autograd.grad(plain.sum(), prediction)
    torch.testing.assert_close(gradient, plain_gradient, atol=0, rtol=1e-6)
    assert (variance_gradient.abs().flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("steps", [1000, 200])
def test_bound_enters_with_a_thousandth_of_its_sum_over_timesteps(steps, x_start, noise):
    scheduler = DDPMScheduler(num_train_timesteps=steps)
    timesteps = torch.tensor([0, 1, 50, 100, 150, 199])
    objective = Objective(scheduler, learn_sigma=True)
    prediction, interpolation = draw(6, 2, 4, 4, seed=2), draw(6, 2, 4, 4, seed=3)
    loss = objective.loss(torch.cat([prediction, interpolation], dim=1), x_start, noise, timesteps)
    error = Objective(scheduler).loss(prediction, x_start, noise, timesteps)
    x_t = scheduler.add_noise(x_start, noise, timesteps)
    predicted = objective.predict_x_start(prediction, x_t, timesteps)
    bound = objective._posterior.bound(x_start, x_t, timesteps, predicted, interpolation)
    torch.testing.assert_close(loss - error, bound * steps / 1000, atol=1e-4, rtol=1e-3)


def test_weighting_multiplies_the_error_and_sees_snr_and_prediction_type(x_start, noise):
    weighting = Mock(return_value=torch.arange(6.0))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    output = draw(6, 2, 4, 4, seed=2)
    weighted = Objective(scheduler, weighting=weighting).loss(output, x_start, noise, TIMESTEPS)
    plain = Objective(scheduler).loss(output, x_start, noise, TIMESTEPS)
    torch.testing.assert_close(weighted, plain * torch.arange(6.0))
    weighting.assert_called_once()
    snr, prediction_type = weighting.call_args.args
    assert prediction_type == "v_prediction"
    expected = diffusers.training_utils.compute_snr(scheduler, TIMESTEPS)
    torch.testing.assert_close(snr, expected, rtol=1e-4, atol=0)


def test_weighting_of_a_flow_sees_its_snr(x_start, noise):
    weighting = Mock(return_value=torch.ones(4))
    objective = Objective(FlowMatchEulerDiscreteScheduler(num_train_timesteps=4), weighting=weighting)
    objective.loss(noise[:4], x_start[:4], noise[:4], torch.arange(4))
    snr, prediction_type = weighting.call_args.args
    torch.testing.assert_close(snr, torch.tensor([9.0, 1.0, 1 / 9, 0.0]))  # sigma is 1/4, 2/4, 3/4, 1
    assert prediction_type == "flow_prediction"


def test_weighting_leaves_the_bound_alone(x_start, noise):
    scheduler = DDPMScheduler()
    output = draw(6, 4, 4, 4, seed=2)

    def loss(factor):
        weighting = lambda snr, _: factor * torch.ones_like(snr)  # noqa: E731
        return Objective(scheduler, True, weighting).loss(output, x_start, noise, TIMESTEPS)

    error = Objective(scheduler).loss(output[:, :2], x_start, noise, TIMESTEPS)
    torch.testing.assert_close(loss(3.0) - loss(1.0), 2 * error, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "learn_sigma", "message"),
    [
        (DDPMScheduler(prediction_type="score"), False, "'score' is none of epsilon, v_prediction, sample, flow"),
        (FlowMatchEulerDiscreteScheduler(), True, "no posterior variance"),
        (diffusers.EDMEulerScheduler(), False, "Cannot train with EDM.*DDPMScheduler.*FlowMatch"),
    ],
)
def test_refuses_schedulers_that_it_cannot_train_with(scheduler, learn_sigma, message):
    with pytest.raises(UserError, match=message):
        Objective(scheduler, learn_sigma)


@pytest.mark.parametrize("solver", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
def test_solver_of_a_flow_trains_on_the_sigmas_that_it_samples_with(solver):
    """Sana and Wan ship such solvers; in 1,000 steps they visit the timesteps of training."""
    scheduler = solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    objective = Objective(scheduler)
    assert objective.prediction_type == "flow_prediction"
    x_start, noise = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    sigmas = objective.add_noise(x_start, noise, torch.arange(1000)).flatten()
    scheduler.set_timesteps(1000)
    visited = scheduler.sigmas[:1000].flip(0).float()
    assert (sigmas - visited).abs().max() < 5e-3
    # The timesteps as the model takes them.
    times = objective.model_timesteps(torch.arange(1000))
    assert (times - sigmas * 1000).abs().max() < 1e-2
