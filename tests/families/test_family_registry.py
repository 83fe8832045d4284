from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.families import Site, describe, find_denoiser, register, registry
from stagepatch.models import DiT
from stagepatch.patch import Patch


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


class Child(DiT): ...


class Grandchild(Child): ...


def test_dit_has_a_site_before_every_block(tiny_dit):
    backbone = describe(tiny_dit())
    assert backbone.model_class == "DiT"
    names = [f"blocks.{index}" for index in range(3)]
    assert [(site.index, site.name, site.module) for site in backbone.sites] == list(
        zip(range(3), names, names, strict=True)
    )
    for site in backbone.sites:
        assert site.module == site.name
        assert (site.channels, site.grid, site.num_tokens, site.layout) == (32, (4, 4), 16, "tokens")
    assert (backbone.time_tap, backbone.condition_taps) == ("t_embedder", ("y_embedder",))
    assert backbone.condition_channels == 32


def test_site_counts_the_tokens_of_its_grid():
    assert Site("a", "a", 0, 8, (4, 6)).num_tokens == 24


@pytest.mark.parametrize(("conditioning", "taps"), [("none", ()), ("text", ("y_embedder",))])
def test_a_dit_is_tapped_where_it_has_a_condition(tiny_dit, conditioning, taps):
    assert describe(tiny_dit(conditioning=conditioning, pooled_projection_dim=6)).condition_taps == taps


def test_description_of_a_model_without_weights():
    with torch.device("meta"):
        backbone = describe(DiT.from_name("DiT-XL/2"))
    assert len(backbone.sites) == 28
    assert backbone.sites[27].num_tokens == 256


def test_unknown_class_is_refused_with_the_known_ones_and_the_way_out():
    with pytest.raises(UserError) as caught:
        describe(nn.Linear(2, 2))
    known = ("Known: AuraFlowTransformer2DModel, ", ", DiT, DiTTransformer2DModel, ")
    for part in ("No description of Linear is known", *known, "stagepatch.families.register('Linear', function)"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="No description of Linear"):
        Patch.create(nn.Linear(2, 2))


def test_subclass_is_described_as_its_parent_unless_it_has_a_description_of_its_own():
    model = Grandchild(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=2)
    assert describe(model).model_class == "DiT"
    assert len(Patch.create(model).prompts) == 2
    for name in ("Child", "Grandchild"):
        register(name, lambda model, sample_size, name=name: name)
        assert describe(model) == name


def test_denoiser_of_a_pipeline_and_of_a_model():
    model = nn.Linear(2, 2)
    compiled = torch.compile(model)
    pipes = [SimpleNamespace(transformer=model), SimpleNamespace(unet=model, transformer=None)]
    for target in (model, *pipes, compiled, SimpleNamespace(unet=compiled)):
        assert find_denoiser(target) is model


def test_one_of_several_denoisers_has_to_be_named():
    one, other = nn.Linear(2, 2), nn.Linear(3, 3)
    pipe = SimpleNamespace(transformer=one, transformer_2=other, vae=nn.Identity())
    assert find_denoiser(pipe, "transformer_2") is other
    assert find_denoiser(pipe, "transformer") is one
    with pytest.raises(UserError, match="several denoisers, transformer, transformer_2: say which with component="):
        find_denoiser(pipe)
    with pytest.raises(UserError, match=r"no model 'transformer_3'\. Its denoisers: transformer, transformer_2"):
        find_denoiser(pipe, "transformer_3")


@pytest.mark.parametrize("target", [None, "model", SimpleNamespace(vae=nn.Identity())], ids=str)
def test_what_has_no_denoiser_is_refused(target):
    with pytest.raises(UserError, match=f"{type(target).__name__} is neither a model nor a pipeline"):
        find_denoiser(target)
