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


X_START, NOISE = draw(6, 2, 4, 4).clamp(-1, 1), draw(6, 2, 4, 4, seed=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_sample_and_velocity_equal_ddpm(schedule):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type="v_prediction")
    objective = Objective(scheduler)
    x_t = objective.add_noise(X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(x_t, scheduler.add_noise(X_START, NOISE, TIMESTEPS), atol=1e-6, rtol=1e-6)
    velocity = objective.target(X_START, NOISE, TIMESTEPS)
    expected = scheduler.get_velocity(X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_implied_x_start_equals_ddpm(schedule, prediction_type):
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type, clip_sample=False)
    prediction, x_t = NOISE, X_START
    for index, timestep in enumerate([0, 1, 250, 500, 900]):
        expected = scheduler.step(prediction[:1], timestep, x_t[:1]).pred_original_sample
        implied = Objective(scheduler).predict_x_start(prediction[:1], x_t[:1], torch.tensor([timestep]))
        torch.testing.assert_close(implied, expected, atol=1e-5, rtol=1e-4, msg=str(index))


def test_targets_are_what_they_are_called():
    for prediction_type, expected in (("epsilon", NOISE), ("sample", X_START)):
        objective = Objective(DDPMScheduler(prediction_type=prediction_type))
        assert torch.equal(objective.target(X_START, NOISE, TIMESTEPS), expected)


@pytest.mark.parametrize("scheduler", [*DDPM, *(FlowMatchEulerDiscreteScheduler(shift=shift) for shift in (1.0, 3.0))])
def test_target_implies_exactly_x_start(scheduler):
    objective = Objective(scheduler)
    clean, noise = X_START.double(), NOISE.double()
    x_t = objective.add_noise(clean, noise, TIMESTEPS)
    implied = objective.predict_x_start(objective.target(clean, noise, TIMESTEPS), x_t, TIMESTEPS)
    torch.testing.assert_close(implied, clean, atol=1e-12 if objective.is_flow else 1e-10, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noisy_sample_equals_scale_noise(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = Objective(scheduler)
    times = objective.model_timesteps(TIMESTEPS)
    torch.testing.assert_close(times, scheduler.timesteps[999 - TIMESTEPS], rtol=1e-6, atol=1e-5)
    expected = scheduler.scale_noise(X_START, scheduler.timesteps[999 - TIMESTEPS], NOISE)
    torch.testing.assert_close(objective.add_noise(X_START, NOISE, TIMESTEPS), expected, atol=1e-6, rtol=1e-6)


def test_flow_target_leads_diffusers_sampler_to_x_start():
    scheduler = FlowMatchEulerDiscreteScheduler()
    target = Objective(scheduler).target(X_START, NOISE, TIMESTEPS)
    scheduler.set_timesteps(7)
    sample = NOISE
    for timestep in scheduler.timesteps:
        sample = scheduler.step(target, timestep, sample).prev_sample
    torch.testing.assert_close(sample, X_START, atol=1e-5, rtol=1e-5)


def test_models_of_diffusion_take_the_timestep_itself():
    assert torch.equal(Objective(DDPMScheduler()).model_timesteps(TIMESTEPS), TIMESTEPS)


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampled", [False, True])
def test_any_scheduler_trains_as_ddpm_does(name, prediction_type, sampled):
    # Published pipelines carry a sampler's scheduler, whose own add_noise may be scaled for sampling.
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type=prediction_type)
    if sampled:
        scheduler.set_timesteps(10)
    objective, reference = Objective(scheduler), DDPMScheduler()
    x_t = objective.add_noise(X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(x_t, reference.add_noise(X_START, NOISE, TIMESTEPS), atol=1e-6, rtol=1e-6)
    expected = NOISE if prediction_type == "epsilon" else reference.get_velocity(X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(objective.target(X_START, NOISE, TIMESTEPS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_sampling_with_the_same_flow_scheduler_changes_nothing(before):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    expected = Objective(scheduler).add_noise(X_START, NOISE, TIMESTEPS)
    if before:
        scheduler.set_timesteps(10)
    objective = Objective(scheduler)
    scheduler.set_timesteps(10)
    assert torch.equal(objective.add_noise(X_START, NOISE, TIMESTEPS), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_noise_of_the_first_timesteps(dtype):
    # 1 − ᾱ of t = 0 is 1e-4: taken in bfloat16 it is 0.
    objective = Objective(DDPMScheduler())
    nothing = torch.zeros_like(X_START)
    expected = objective.add_noise(nothing, NOISE, TIMESTEPS)
    rounded = objective.add_noise(nothing.to(dtype), NOISE.to(dtype), TIMESTEPS)
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
def test_loss_is_each_samples_mean_squared_error(scheduler):
    objective = Objective(scheduler)
    output = draw(6, 2, 4, 4, seed=2)
    target = NOISE - X_START if objective.is_flow else objective.target(X_START, NOISE, TIMESTEPS)
    expected = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(objective.loss(output, X_START, NOISE, TIMESTEPS), expected)


def test_perfect_prediction_has_no_loss_and_loss_is_taken_in_float32():
    objective = Objective(DDPMScheduler())
    assert objective.loss(NOISE, X_START, NOISE, TIMESTEPS).abs().max() == 0
    assert objective.loss(NOISE.bfloat16(), X_START, NOISE, TIMESTEPS).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_bound_trains_the_interpolation_and_leaves_the_prediction_to_the_error(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    prediction = draw(6, 2, 4, 4, seed=2).requires_grad_()
    interpolation = draw(6, 2, 4, 4, seed=3).requires_grad_()
    learned = Objective(scheduler, learn_sigma=True)
    loss = learned.loss(torch.cat([prediction, interpolation], dim=1), X_START, NOISE, TIMESTEPS)
    gradient, variance_gradient = torch.autograd.grad(loss.sum(), [prediction, interpolation])
    target = learned.target(X_START, NOISE, TIMESTEPS)
    plain = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    (plain_gradient,) = torch.autograd.grad(plain.sum(), prediction)
    torch.testing.assert_close(gradient, plain_gradient, atol=0, rtol=1e-6)
    assert (variance_gradient.abs().flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("steps", [1000, 200])
def test_bound_enters_with_a_thousandth_of_its_sum_over_timesteps(steps):
    scheduler = DDPMScheduler(num_train_timesteps=steps)
    timesteps = torch.tensor([0, 1, 50, 100, 150, 199])
    objective = Objective(scheduler, learn_sigma=True)
    prediction, interpolation = draw(6, 2, 4, 4, seed=2), draw(6, 2, 4, 4, seed=3)
    loss = objective.loss(torch.cat([prediction, interpolation], dim=1), X_START, NOISE, timesteps)
    error = Objective(scheduler).loss(prediction, X_START, NOISE, timesteps)
    x_t = scheduler.add_noise(X_START, NOISE, timesteps)
    predicted = objective.predict_x_start(prediction, x_t, timesteps)
    bound = objective._posterior.bound(X_START, x_t, timesteps, predicted, interpolation)
    torch.testing.assert_close(loss - error, bound * steps / 1000, atol=1e-4, rtol=1e-3)


def test_weighting_multiplies_the_error_and_sees_snr_and_prediction_type():
    weighting = Mock(return_value=torch.arange(6.0))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    output = draw(6, 2, 4, 4, seed=2)
    weighted = Objective(scheduler, weighting=weighting).loss(output, X_START, NOISE, TIMESTEPS)
    plain = Objective(scheduler).loss(output, X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(weighted, plain * torch.arange(6.0))
    weighting.assert_called_once()
    snr, prediction_type = weighting.call_args.args
    assert prediction_type == "v_prediction"
    expected = diffusers.training_utils.compute_snr(scheduler, TIMESTEPS)
    torch.testing.assert_close(snr, expected, rtol=1e-4, atol=0)


def test_weighting_of_a_flow_sees_its_snr():
    weighting = Mock(return_value=torch.ones(4))
    objective = Objective(FlowMatchEulerDiscreteScheduler(num_train_timesteps=4), weighting=weighting)
    objective.loss(NOISE[:4], X_START[:4], NOISE[:4], torch.arange(4))
    snr, prediction_type = weighting.call_args.args
    torch.testing.assert_close(snr, torch.tensor([9.0, 1.0, 1 / 9, 0.0]))  # sigma is 1/4, 2/4, 3/4, 1
    assert prediction_type == "flow_prediction"


def test_weighting_leaves_the_bound_alone():
    scheduler = DDPMScheduler()
    output = draw(6, 4, 4, 4, seed=2)

    def loss(factor):
        weighting = lambda snr, _: factor * torch.ones_like(snr)  # noqa: E731
        return Objective(scheduler, True, weighting).loss(output, X_START, NOISE, TIMESTEPS)

    error = Objective(scheduler).loss(output[:, :2], X_START, NOISE, TIMESTEPS)
    torch.testing.assert_close(loss(3.0) - loss(1.0), 2 * error, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "learn_sigma", "message"),
    [
        (DDPMScheduler(prediction_type="score"), False, "'score' is none of epsilon, v_prediction, sample, flow"),
        (FlowMatchEulerDiscreteScheduler(), True, "no posterior variance"),
        (diffusers.EDMEulerScheduler(), True, "no posterior variance"),
        (diffusers.ScoreSdeVeScheduler(), False, "Cannot train with ScoreSdeVe.*DDPMScheduler.*FlowMatch.*EDM"),
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


EDM = [
    scheduler(prediction_type=kind, sigma_data=data)
    for scheduler in (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler)
    for kind, data in (("epsilon", 0.5), ("v_prediction", 1.0))
]


@pytest.mark.parametrize("scheduler", EDM)
def test_edm_is_preconditioned_as_diffusers_does(scheduler):
    objective = Objective(scheduler)
    told = objective.model_timesteps(TIMESTEPS)
    sigma = (4.0 * told.double()).exp()
    assert (sigma[0], sigma[-1]) == pytest.approx((scheduler.config.sigma_min, scheduler.config.sigma_max))
    torch.testing.assert_close(told, scheduler.precondition_noise(sigma).float())
    sigma, clean, noise = sigma.view(-1, 1, 1, 1), X_START.double(), NOISE.double()
    noisy, target = clean + sigma * noise, objective.target(clean, noise, TIMESTEPS)
    x_t = objective.add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(x_t, scheduler.precondition_inputs(noisy, sigma), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scheduler.precondition_outputs(noisy, target, sigma), clean, atol=1e-5, rtol=1e-5)
    answer = draw(6, 2, 4, 4, seed=2).double()
    denoised = scheduler.precondition_outputs(noisy, answer, sigma)
    torch.testing.assert_close(objective.predict_x_start(answer, x_t, TIMESTEPS), denoised, atol=1e-5, rtol=1e-5)
    # The loss is λ(σ)·(D − x_start)², λ = (σ² + σ_data²) / (σ·σ_data)² (arXiv 2206.00364, Table 1).
    data = scheduler.config.sigma_data
    weighed = (sigma**2 + data**2) / (sigma * data) ** 2 * (denoised - clean) ** 2
    loss = objective.loss(answer, clean, noise, TIMESTEPS)
    torch.testing.assert_close(loss.double(), weighed.mean(dim=(1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_edm_draws_log_sigma_as_its_paper():
    objective = Objective(diffusers.EDMEulerScheduler())
    timesteps = objective.draw_timesteps(50_000, torch.Generator().manual_seed(0))
    log_sigma = 4.0 * objective.model_timesteps(timesteps)
    assert (log_sigma.mean(), log_sigma.std()) == pytest.approx((-1.2, 1.2), abs=0.03)
    assert objective.levels[timesteps].max() <= 1.0
