"""Sites of other shapes than a DiT's, on a model made for the purpose."""

import pytest
import torch
from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.families import Backbone, Site, registry
from stagepatch.patch import Patch, PatchConfig


class Keywords(nn.Module):
    """A model whose blocks take their hidden states by keyword."""

    def __init__(self, grids=((2, 2), (2, 2)), layout="tokens", missing=False):
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList(KeywordBlock() for _ in grids)
        self.grids, self.layout, self.missing = grids, layout, missing

    def forward(self, tokens, timesteps):
        self.time(timesteps)
        for block in self.blocks:
            tokens = block(tokens=tokens)
        return tokens


class KeywordBlock(nn.Module):
    def forward(self, tokens):
        return tokens


def describe(model, sample_size):
    sites = tuple(
        Site(f"b{i}", f"blocks.{i + model.missing}", i, 4, grid, model.layout, argument="tokens")
        for i, grid in enumerate(model.grids)
    )
    return Backbone("Keywords", sites, "time", (), 4, model.grids[0])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})
    registry.register("Keywords", describe)


def test_hidden_states_given_by_keyword_get_the_mixture():
    model = Keywords()
    patch = Patch.create(model, PatchConfig(gate="none", initialization="normal"))
    tokens, timesteps = torch.randn(3, 4, 4), torch.ones(3, 1)
    with patch.attach(model):
        output = model(tokens, timesteps)
    torch.testing.assert_close(output, tokens + patch.prompts[0] + patch.prompts[1])


def test_sites_of_different_sizes_share_the_gate():
    model = Keywords(grids=((4, 4), (2, 2)))
    patch = Patch.create(model, PatchConfig())
    assert [tuple(prompt.shape) for prompt in patch.prompts] == [(16, 4), (4, 4)]
    assert patch.gate.bias.shape == (16,)


PREPEND = {"position": "prepend"}


@pytest.mark.parametrize(
    ("layout", "choices", "message"),
    [
        ("map", PREPEND | {"prepending": "plain"}, "needs sites .*image tokens alone.*; Keywords has others: b0, b1"),
        ("map", PREPEND | {"prepending": "gated"}, "needs sites .*attention is descr.*; Keywords has others: b0, b1"),
        ("tokens", {"sites": "stages"}, "Keywords has no stages"),
        ("tokens", {"sites": "attention"}, "Keywords has no attention"),
        ("tokens", {"sites": ["b0", "b7"]}, r"No site is named b7\. Sites of this model: b0, b1"),
    ],
)
def test_choices_for_which_the_model_lacks_the_sites_are_refused(layout, choices, message):
    with pytest.raises(UserError, match=message):
        Patch.create(Keywords(layout=layout), PatchConfig(**choices))


def test_description_of_a_module_that_is_not_there_leaves_the_model_as_it_was():
    model = Keywords(missing=True)
    patch = Patch.create(model)
    with pytest.raises(UserError, match=r"no module 'blocks.2'"):
        patch.attach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gate_sees_every_forward_of_a_model_without_an_extent_to_read():
    model = Keywords()
    patch = Patch.create(model, PatchConfig(gate_initialization="normal"))
    with patch.attach(model):
        model(torch.randn(3, 4, 4), torch.ones(3, 1))
        first = patch.last
        model(torch.randn(3, 4, 4), torch.zeros(3, 1))
    assert not torch.equal(first.logits, patch.last.logits)
