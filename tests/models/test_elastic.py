"""Learned architectures (DiffPruning, arXiv 2409.15557): gates, costs and the budget by hand, and against torch."""

from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stagepatch.models import Architectures, BlockCost, Gated, keep, ranks
from stagepatch.models.elastic import gumbel_sigmoid
from tests.models.test_pruning import HEADS, with_gradients

TOKENS = 16


def test_gates_are_on_with_the_sigmoids_probability_and_have_its_gradient():
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(40_000, 3).clone().requires_grad_(True)
    gates = gumbel_sigmoid(logits, torch.Generator().manual_seed(0))
    assert set(gates.detach().flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(gates.detach().mean(dim=0), torch.sigmoid(logits[0].detach()), rtol=0, atol=0.01)
    gates.sum().backward()
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    soft = 1 / (1 + torch.exp(-(logits.detach() + (uniform / (1 - uniform)).log()) / 0.4))
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 0.4, rtol=1e-3, atol=1e-5)


def architectures_of(model, seed=0):
    """Of two ranges, the second with ranks of its own, and gates of each that are equal in number to no other's."""
    first = ranks(model)
    second = tuple(torch.stack([row[torch.randperm(len(row))] for row in each]) for each in first)
    found = Architectures([first, second])
    blocks, heads, groups = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2, HEADS), torch.zeros(2, found.groups)
    heads[0, [0, 2]], heads[1, [0, 1, 3]] = 1.0, 1.0
    groups[0, :5], groups[1, [0, 2, 9]] = 1.0, 1.0
    return found, [blocks, heads, groups]


def test_gated_each_sample_computes_as_the_model_of_its_range_alone():
    torch.manual_seed(0)
    model, arguments = with_gradients()
    before = model(*arguments)[0]
    found, gates = architectures_of(model)
    numbers = torch.tensor([1, 0, 1])
    with Gated(model, found, gates, numbers):
        together = model(*arguments)[0]
    assert torch.equal(model(*arguments)[0], before)
    for number in (0, 1):
        alone = keep(model, found.kept(gates, number))
        assert len(alone.blocks) == 2 - number
        assert alone.config.num_attention_heads == (2, 3)[number]
        rows = numbers == number
        torch.testing.assert_close(together[rows], alone(*arguments)[0][rows])
    assert not torch.allclose(together, before, atol=0.01)


def test_costs_are_those_that_torch_counts():
    model, arguments = with_gradients()
    found, gates = architectures_of(model)
    whole = flops(model, arguments)
    cost = BlockCost(model, TOKENS)
    costs = found.costs(gates, cost)
    for number in (0, 1):
        alone = flops(keep(model, found.kept(gates, number)), arguments)
        assert whole - alone == 2 * cost.whole - float(costs[number])


def flops(model, arguments):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*(argument[:1] for argument in arguments))
    return counter.get_total_flops()


def test_a_budget_is_spent_by_hand():
    """A head costs 3, a channel 1, the rest 2; two ranges, of a quarter and three quarters of the timesteps."""
    places = torch.arange(2).expand(2, 2), torch.arange(2).expand(2, 2)
    found = Architectures([places, places])
    found.blocks.data = torch.tensor([[0.0, 9.0], [5.0, 1.0]])
    found.heads.data = torch.tensor([[0.0, 8.0], [0.0, 7.0]])
    found.channels.data = torch.tensor([[0.0, -1.0], [0.0, 6.0]])
    cost, shares = SimpleNamespace(head=3.0, channel=1.0, rest=2.0), torch.tensor([0.25, 0.75])

    def spent(budget):
        return [each.int().tolist() for each in found.spend(cost, shares, budget)]

    # The least is one block of a head and a channel in each: 0.25 · 6 + 0.75 · 6.
    assert spent(6.0) == [[[0, 1], [1, 0]], [[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    # 6.75: range 0's second head. 9.0: range 1's. 9.75: its second channel, which 9.0 does not pay for.
    assert spent(9.0) == [[[0, 1], [1, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 0]]]
    # At 7.75 range 1's head is too dear (9.0), its channel is not (7.5), and range 0's channel (7.75) fills it up.
    assert spent(7.75) == [[[0, 1], [1, 0]], [[1, 1], [1, 0]], [[1, 1], [1, 1]]]
    assert spent(20.0) == [[[1, 1], [1, 1]]] * 3
