"""Balance losses (arXiv 2405.17825, Eq. 11–13) against numbers worked out by hand."""

import math

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.families import predict
from stagepatch.patch import balance
from stagepatch.patch.prompts import Mixture

# Two blocks, two samples, two prompts.
WEIGHTS = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]], dtype=torch.float64)
LOGITS = torch.tensor([[[-1.0, 2.0, -0.5]], [[1.0, 1.0, -3.0]]], dtype=torch.float64)


EQUAL = torch.full((3, 2, 4), 0.25)
DOUBLED = torch.cat([LOGITS, -LOGITS], dim=1)


@pytest.mark.parametrize(
    ("loss", "values", "expected"),
    [
        # Sums over the blocks: (1.4, 0.6), mean 1, variance 0.16; and (1, 1), variance 0. Mean of the two samples.
        (balance.importance_loss, WEIGHTS, (0.16 / (1 + 1e-5) + 0) / 2),
        # A block's four weights together, n − 1 = 3: 0.18/3 and 0.02/3, each over mean² = 0.25; sum over the blocks.
        (balance.importance_loss_unbiased, WEIGHTS, (0.18 / 3 + 0.02 / 3) / (0.25 + 1e-5)),
        (balance.importance_loss, EQUAL, 0),
        (balance.importance_loss_unbiased, EQUAL, 0),
        # Two of the first block's logits are below zero, one of the second's; how far below; means over the batch.
        (balance.load_indicator, LOGITS, (2 + 1) / 2),
        (balance.load_surrogate, LOGITS, (1 + 0.5 + 3) / 2),
        (balance.load_indicator, DOUBLED, (1.5 + 1.5) / 2),
        (balance.load_surrogate, DOUBLED, (2.25 + 2.0) / 2),
    ],
)
def test_terms_of_numbers_written_out(loss, values, expected):
    assert loss(values).item() == pytest.approx(expected, rel=1e-12, abs=0)


def test_surrogate_is_zero_exactly_where_the_indicator_is():
    generator = torch.Generator().manual_seed(0)
    for shift in (-3.0, 0.0, 3.0):
        logits = torch.rand(2, 3, 4, generator=generator) + shift
        assert (balance.load_surrogate(logits) == 0) == (balance.load_indicator(logits) == 0)


def test_smooth_load_is_the_chance_to_be_selected_under_fresh_noise():
    generator = torch.Generator().manual_seed(0)
    samples, choices, k, draws = 2, 5, 2, 20_000
    logits = torch.randn(1, samples, choices, generator=generator, dtype=torch.float64)
    noise_std = 0.3 + torch.rand(1, samples, choices, generator=generator, dtype=torch.float64)
    noisy = logits + noise_std * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    load = torch.zeros(choices, dtype=torch.float64)
    for sample in range(samples):
        for choice in range(choices):
            trials = noisy[0, sample].repeat(draws, 1)
            fresh = torch.randn(draws, generator=generator, dtype=torch.float64)
            trials[:, choice] = logits[0, sample, choice] + noise_std[0, sample, choice] * fresh
            load[choice] += (trials.topk(k).indices == choice).any(dim=1).double().mean()
    expected = load.var(correction=0) / load.mean() ** 2
    assert expected > 0.01
    assert balance.load_smooth(logits, noisy, noise_std, k).item() == pytest.approx(expected.item(), rel=0.03)


def test_smooth_load_is_a_mean_over_the_blocks_and_has_a_gradient():
    generator = torch.Generator().manual_seed(1)
    logits, noise = (torch.randn(3, 2, 6, generator=generator) for _ in range(2))
    logits.requires_grad_()
    std = torch.ones_like(noise)
    whole = balance.load_smooth(logits, logits + noise, std, 2)
    parts = [balance.load_smooth(*(x[[i]] for x in (logits, logits + noise, std)), 2) for i in range(3)]
    assert whole.item() == pytest.approx(sum(parts).item() / 3, rel=1e-5)
    whole.backward()
    assert logits.grad.abs().max() > 0


def test_balance_terms_are_those_of_the_last_forward(model, batch, make_patch):
    patch = make_patch(model)
    with patch.attach(model):
        predict(model, *batch)
        t = model.t_embedder(batch[1])
    weight, bias = patch.gate.weight, patch.gate.bias
    logits = torch.stack([t @ weight[:, :-1].T + i * weight[:, -1] + bias for i in range(3)])
    terms = patch.balance_terms()
    assert terms["load"].item() == pytest.approx(balance.load_surrogate(logits).item(), rel=1e-5)
    summed = logits.softmax(-1).sum(0)
    expected = sum(row.var(correction=0) / (row.mean() ** 2 + 1e-5) for row in summed) / len(summed)
    assert terms["importance"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_indicator_has_no_gradient_and_importance_and_surrogate_have(used_patch):
    for load_loss in ("indicator", "surrogate"):
        patch = used_patch(load_loss=load_loss)
        terms = patch.balance_terms()
        assert terms["load"] > 0
        assert terms["load"].requires_grad == (load_loss == "surrogate")
        (gradient,) = torch.autograd.grad(terms["importance"], patch.gate.weight, retain_graph=True)
        assert gradient.abs().max() > 0
        patch.balance_loss().backward()
        assert patch.gate.weight.grad.abs().max() > 0


def test_balance_losses_before_any_forward_are_refused(tiny_dit, make_patch):
    patch = make_patch(tiny_dit())
    for refused in (patch.balance_loss, patch.balance_terms):
        with pytest.raises(UserError, match="forward"):
            refused()


def test_patch_without_a_gate_has_no_balance_loss(used_patch):
    patch = used_patch(gate="none")
    assert patch.balance_terms() == {}
    assert (patch.balance_loss().item(), patch.gate_entropy().item()) == (0, 0)


def test_gate_entropy_of_numbers_written_out(tiny_dit, make_patch):
    patch = make_patch(tiny_dit())
    assert patch.gate_entropy().item() == 0
    weights = torch.tensor([[[0.5, 0.5, 0.0]], [[1.0, 1.0, 1.0]]])  # the second: hard, weight 1 each
    patch.last = Mixture(LOGITS, LOGITS, None, weights)
    assert patch.gate_entropy().item() == pytest.approx((math.log(2) + math.log(3)) / 2)
