"""Merging stages of one SGD step is one step on a reweighted loss (DeMe, arXiv 2410.06664, supplement, Eq. 13)."""

import copy

import torch

from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.diffusion.timesteps import equal_in_t
from stagepatch.families import predict
from stagepatch.merging import combine


def step(model, losses, rate=0.1):
    """One SGD step on a sum of losses, as a dict of tensors."""
    gradients = torch.autograd.grad(losses, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {
        name: parameter.detach() - rate * gradient
        for name, parameter, gradient in zip(names, model.parameters(), gradients, strict=True)
    }


def test_one_step_each_then_merged_is_one_step_on_the_weighted_sum(tiny_dit):
    base = tiny_dit(learn_sigma=False).double().requires_grad_(True)
    objective = Objective(make_scheduler(ObjectiveConfig()))
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    ranges, weights = equal_in_t(1000, 4), [0.1, 0.4, 0.2, 0.5]
    labels = torch.arange(16) % 10

    def loss(model, first, stop):
        timesteps = torch.randint(first, stop, (16,), generator=torch.Generator().manual_seed(first))
        error = predict(model, objective.add_noise(x_start, noise, timesteps), timesteps, labels) - noise
        return error.square().mean()

    stages = []
    for first, stop in ranges:
        stage = copy.deepcopy(base)
        stages.append(step(stage, loss(stage, first, stop)))
    expected = step(base, sum(w * loss(base, *limits) for w, limits in zip(weights, ranges, strict=True)))
    for name, parameter in base.named_parameters():
        merged = combine(parameter.detach(), [stage[name] for stage in stages], weights)
        torch.testing.assert_close(merged, expected[name], rtol=1e-12, atol=1e-14)
