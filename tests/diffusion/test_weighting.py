"""Weightings against the identities between predictions, and the forms that their papers print."""

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.diffusion import Objective, ObjectiveConfig, WeightingConfig, make_scheduler, make_weighting
from stagepatch.families import predict

NAMES = ["snr", "snr_plus_one", "truncated_snr", "min_snr", "p2"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow_prediction"]
SNR = torch.logspace(-4, 4, 33, dtype=torch.float64)


def weight(name, prediction_type, snr=SNR, **choices):
    return make_weighting(WeightingConfig(name, **choices))(snr, prediction_type)


def errors(snr):
    """Squared errors of four predictions that stand for one and the same wrong x_start."""
    generator = torch.Generator().manual_seed(0)
    x_start, wrong, noise = (torch.randn(len(snr), 64, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, sigma = (snr / (1 + snr)).sqrt()[:, None], (1 / (1 + snr)).sqrt()[:, None]
    x_t = alpha * x_start + sigma * noise
    wrong_noise = (x_t - alpha * wrong) / sigma
    s = (1 / (1 + snr.sqrt()))[:, None]
    flow_x_t = (1 - s) * x_start + s * noise
    pairs = {
        "sample": (x_start, wrong),
        "epsilon": (noise, wrong_noise),
        "v_prediction": (alpha * noise - sigma * x_start, alpha * wrong_noise - sigma * wrong),
        "flow_prediction": (noise - x_start, (flow_x_t - (1 - s) * wrong) / s - wrong),
    }
    return {name: ((right - given) ** 2).mean(dim=1) for name, (right, given) in pairs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_weighting_weighs_the_same_mistake_alike_whatever_is_predicted(name):
    of = errors(SNR)
    on_x_start = weight(name, "sample") * of["sample"]
    for prediction_type in ("epsilon", "v_prediction", "flow_prediction"):
        torch.testing.assert_close(weight(name, prediction_type) * of[prediction_type], on_x_start, rtol=1e-9, atol=0)


def test_forms_in_print():
    one = torch.ones_like(SNR)
    torch.testing.assert_close(weight("snr", "epsilon"), one)
    torch.testing.assert_close(weight("snr_plus_one", "v_prediction"), one)
    torch.testing.assert_close(weight("truncated_snr", "sample"), torch.maximum(SNR, one))
    # Min-SNR, arXiv 2303.09556, Sec. 3.4: for x_start, noise and velocity.
    capped = torch.minimum(SNR, 5 * one)
    torch.testing.assert_close(weight("min_snr", "sample"), capped)
    torch.testing.assert_close(weight("min_snr", "epsilon"), capped / SNR)
    torch.testing.assert_close(weight("min_snr", "v_prediction"), capped / (SNR + 1))
    torch.testing.assert_close(weight("min_snr", "sample", gamma=2.0), torch.minimum(SNR, 2 * one))
    # P2, arXiv 2204.00227, Eq. 8: on the noise 1 / (k + SNR)^gamma.
    torch.testing.assert_close(weight("p2", "epsilon"), 1 / (1 + SNR))
    torch.testing.assert_close(weight("p2", "epsilon", k=2.0, gamma=0.5), (2 + SNR) ** -0.5)
    assert all(torch.equal(weight("constant", kind), one) for kind in PREDICTION_TYPES)


def test_pure_noise_and_none_have_finite_weights():
    ends = torch.tensor([0.0, 1e12], dtype=torch.float64)
    assert all(weight(name, kind, ends).isfinite().all() for name in NAMES for kind in PREDICTION_TYPES)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_objective_weighs_its_loss(tiny_dit, batch, name, prediction_type):
    scheduler = make_scheduler(ObjectiveConfig(prediction_type=prediction_type))
    x_start, timesteps, labels = batch
    noise = torch.randn_like(x_start)
    plain = Objective(scheduler)
    weighed = Objective(scheduler, weighting=make_weighting(WeightingConfig(name)))
    output = predict(tiny_dit(learn_sigma=False), plain.add_noise(x_start, noise, timesteps), timesteps, labels)
    if prediction_type == "flow_prediction":
        sigma = (timesteps + 1) / 1000
        snr = ((1 - sigma) / sigma) ** 2
    else:
        snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    ratio = weighed.loss(output, x_start, noise, timesteps) / plain.loss(output, x_start, noise, timesteps)
    torch.testing.assert_close(ratio.double(), weight(name, prediction_type, snr.double()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WeightingConfig("min-snr"), "'min-snr' is none of constant, snr"),
        (WeightingConfig("p2", gamma=0.0), "gamma=0.0 and k=1.0 must be above 0"),
        (WeightingConfig("p2", k=-1.0), "k=-1.0 must be above 0"),
    ],
)
def test_bad_weightings_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_weighting(config)
