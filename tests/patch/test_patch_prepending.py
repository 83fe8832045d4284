"""Prompts behind a gate that starts at zero, against attention written out."""

import pytest
import torch

from stagepatch.families import predict
from stagepatch.patch import Patch, PatchConfig
from tests.tiny import FAMILIES


def test_it_is_the_blocks_attention_plus_a_gated_one_to_the_prompts(tiny_dit, make_patch):
    """One block's attention in float64, a head and a sample at a time (arXiv 2303.16199, Sec. 3.2)."""
    model = tiny_dit().double()
    patch = make_patch(model, position="prepend", num_prompts=3, sites="first").double()
    attention = model.blocks[0].attn
    seen = {}
    attention.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    attention.proj.register_forward_pre_hook(lambda module, args: seen.update(plain=args[0]))
    patch.attach(model)
    attention.proj.register_forward_pre_hook(lambda module, args: seen.update(both=args[0]))
    patch.scale = 0.7
    sample = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    predict(model, sample, torch.tensor([10, 800]), torch.tensor([0, 1]))

    heads, width = 2, 16
    query, key, value = (attention.qkv(seen["tokens"]).view(2, 16, 3, heads, width)[:, :, part] for part in range(3))
    for row in range(2):
        prompts = patch.last.weights[0, row].unsqueeze(1) * patch.prompts[0]
        projected = attention.qkv(prompts).view(3, 3, heads, width)
        for head in range(heads):
            keys, values = projected[:, 1, head], projected[:, 2, head]
            own = (query[row, :, head] @ key[row, :, head].T / width**0.5).softmax(-1) @ value[row, :, head]
            toward = (query[row, :, head] @ keys.T / width**0.5).softmax(-1) @ values
            expected = own + 0.7 * torch.tanh(patch.head_gates[0][head]) * toward
            got = {name: seen[name][row].view(16, heads, width)[:, head] for name in ("plain", "both")}
            torch.testing.assert_close(got["plain"], own, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got["both"], expected, rtol=1e-9, atol=1e-9)


def test_gates_move_first_and_then_the_prompts(model, batch):
    """At zero gates the prompts have no gradient; after one step of the gates they have."""
    patch = Patch.create(model, PatchConfig(position="prepend", num_prompts=4)).train()
    patch.attach(model)
    optimizer = torch.optim.SGD(patch.parameters(), lr=1.0)
    predict(model, *batch).square().mean().backward()
    assert all(gate.grad.abs().min() > 0 for gate in patch.head_gates)
    assert all(prompts.grad.abs().max() == 0 for prompts in patch.prompts)
    optimizer.step()
    optimizer.zero_grad()
    predict(model, *batch).square().mean().backward()
    assert all(prompts.grad.abs().amax(dim=1).min() > 0 for prompts in patch.prompts)


def test_norms_of_queries_and_keys_are_applied_to_the_prompts():
    family = FAMILIES["SD3Transformer2DModel"]
    model = family.model()
    patch = Patch.create(model, PatchConfig(position="prepend", num_prompts=3, sites="first"))
    with torch.no_grad():
        patch.head_gates[0].fill_(1.0)
        patch.attach(model)
        expected = family.call(model)
        # A normed key does not change with the prompts' length, but the values do.
        model.transformer_blocks[0].attn.to_v.weight.zero_()
        model.transformer_blocks[0].attn.to_v.bias.zero_()
        silent = family.call(model)
        patch.prompts[0].mul_(7.0)
        torch.testing.assert_close(family.call(model), silent)
    assert not torch.allclose(expected, silent)


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "FluxTransformer2DModel", "UNet2DModel"])
def test_families_whose_attention_is_not_described_refuse_it(name):
    with pytest.raises(ValueError, match="needs sites whose attention is described"):
        Patch.create(FAMILIES[name].model(), PatchConfig(position="prepend", sites="all"))
