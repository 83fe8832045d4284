"""Losses by timestep against the objective by hand, errors against the bootstrap, a fitted patch against its base."""

import math

import pytest
import torch

from stagepatch.analysis import Samples, difference, estimate, loss_at_timesteps, relative_difference
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.diffusion.timesteps import TimestepSampler
from stagepatch.methods import load_learned
from tests.runs import make_dataset, make_model, make_objective, run


def test_losses_are_the_objective_by_hand():
    model = make_model(learn_sigma=False)
    objective = Objective(make_scheduler(ObjectiveConfig(prediction_type="v_prediction")))
    samples = Samples(make_dataset(), [10, 800], 6, batch_size=4)
    found = loss_at_timesteps(model, objective, samples)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)
    for row, timestep in zip(found, [10, 800], strict=True):
        signal, sigma = alphas_cumprod[timestep].sqrt().float(), (1 - alphas_cumprod[timestep]).sqrt().float()
        expected = []
        for draws in samples.at(timestep, model, objective):
            x_t = signal * draws.x_start + sigma * draws.noise
            with torch.no_grad():
                output = model(x_t, torch.full((len(x_t),), timestep), draws.condition["class_labels"]).sample
            target = signal * draws.noise - sigma * draws.x_start
            expected += [float(value) for value in (output - target).square().mean(dim=(1, 2, 3))]
        assert row.tolist() == pytest.approx(expected, rel=1e-4)


def test_images_and_labels_belong_together_and_no_label_is_dropped():
    dataset = make_dataset()
    label_of = {float(image.sum()): int(label) for image, label in zip(dataset.images, dataset.labels, strict=True)}
    for draws in Samples(dataset, [3], 30, batch_size=8).at(3, make_model(), make_objective()):
        labels = draws.condition["class_labels"].tolist()
        assert [label_of[float(image.sum())] for image in draws.x_start] == labels


def test_a_model_against_itself_differs_by_nothing():
    samples = Samples(make_dataset(), [100, 900], 8, batch_size=8)
    base, same, other = (loss_at_timesteps(make_model(seed), make_objective(), samples) for seed in (0, 0, 1))
    assert torch.equal(base, same)
    assert relative_difference(base, same).mean == difference(base, same).error == 0.0
    assert difference(base, other).mean == pytest.approx(float(other.mean() - base.mean()))


def test_a_patch_lowers_the_loss_where_it_was_fitted(tmp_path):
    objective = make_objective(learn_sigma=False)
    objective.timesteps = TimestepSampler(1000, 0, 200)
    training = {"steps": 60, "batch_size": 16, "learning_rate": 0.3, "label_dropout": 0.0}
    run(tmp_path, model=make_model(learn_sigma=False), objective=objective, **training)
    samples = Samples(make_dataset(), [50, 150], 64, batch_size=32)
    base = make_model(learn_sigma=False)
    before = loss_at_timesteps(base, objective, samples)
    load_learned(base, tmp_path)
    after = loss_at_timesteps(base, objective, samples)
    for one, two in zip(before.split(1), after.split(1), strict=True):
        change = relative_difference(one, two)
        assert change.mean < -4 * change.error < 0


def test_errors_are_those_of_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(2, 200, dtype=torch.float64, generator=generator) * torch.tensor([[1.0], [9.0]])
    other = 0.8 * base + 0.3 * torch.randn(2, 200, dtype=torch.float64, generator=generator)
    means, ratios = [], []
    for _ in range(2000):
        rows = torch.randint(0, 200, (2, 200), generator=generator)
        one, two = base.gather(1, rows), other.gather(1, rows)
        means.append(one.mean())
        ratios.append((two - one).mean() / one.mean())
    assert estimate(base).error == pytest.approx(float(torch.stack(means).std()), rel=0.08)
    assert relative_difference(base, other).error == pytest.approx(float(torch.stack(ratios).std()), rel=0.08)
    assert relative_difference(base, other).mean == pytest.approx(-0.2, abs=0.02)


def test_one_sample_has_no_error_and_a_loss_of_zero_no_ratio():
    assert math.isnan(estimate(torch.ones(3, 1)).error)
    assert math.isnan(relative_difference(torch.zeros(1, 4), torch.ones(1, 4)).mean)
