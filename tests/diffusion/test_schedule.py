import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1000, 250])
def test_betas_equal_diffusers(name, steps):
    choices = {"num_train_timesteps": steps, "beta_schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
    assert torch.equal(make_scheduler(ObjectiveConfig(**choices)).betas, DDPMScheduler(**choices).betas)


def test_default_betas_are_those_of_ddpm():
    assert torch.allclose(make_scheduler(ObjectiveConfig()).betas, torch.linspace(1e-4, 0.02, 1000))


def test_cosine_betas_follow_their_equation():
    # arXiv 2102.09672, Eq. 17
    betas = make_scheduler(ObjectiveConfig(beta_schedule="squaredcos_cap_v2")).betas.double()
    place = torch.arange(1001, dtype=torch.float64) / 1000
    cumulative = torch.cos((place + 0.008) / 1.008 * torch.pi / 2) ** 2
    assert torch.allclose(betas, (1 - cumulative[1:] / cumulative[:-1]).clamp(max=0.999), atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_carries_prediction_type_and_clipping(prediction_type):
    config = make_scheduler(ObjectiveConfig(prediction_type=prediction_type, clip_sample=True)).config
    assert (config.prediction_type, config.clip_sample) == (prediction_type, True)
    assert not make_scheduler(ObjectiveConfig()).config.clip_sample


@pytest.mark.parametrize(("learn_sigma", "expected"), [(True, "learned_range"), (False, "fixed_small")])
def test_samplers_are_told_whether_the_variance_is_learned(learn_sigma, expected):
    assert make_scheduler(ObjectiveConfig(), learn_sigma).config.variance_type == expected


def test_flow_prediction_gets_a_flow_scheduler():
    scheduler = make_scheduler(ObjectiveConfig(prediction_type="flow_prediction", num_train_timesteps=500))
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert Objective(scheduler).num_train_timesteps == 500
