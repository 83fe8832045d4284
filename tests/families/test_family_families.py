"""What must hold for every family, on tiny models of diffusers' own classes."""

import math

import pytest
import torch
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.families import describe
from stagepatch.patch import Patch, PatchConfig
from tests.tiny import FAMILIES, FRAMES

SIZELESS = {"FluxTransformer2DModel": (8, 8), "QwenImageTransformer2DModel": (8, 8)}
VIDEO = {"WanTransformer3DModel": (FRAMES, 8, 8)}


@pytest.fixture(params=list(FAMILIES))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


def config_for(name, **choices):
    size = SIZELESS.get(name) or VIDEO.get(name)
    return PatchConfig(**{"sample_size": list(size) if size else None, **choices})


def drawn(patch, seed=3):
    """Every weight of a patch drawn, the prompts large: a mixture that can be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            std = 20.0 if name.startswith("prompts") else 0.1
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return patch


def choices_of(name):
    everywhere = [{}, {"num_experts": 2}, {"condition": "t+c"}, {"grid": [2, 2]}, {"gate": "none"}]
    if name in VIDEO:
        everywhere[3] = {"grid": [2, 2, 2]}
    if name.startswith("UNet"):
        everywhere += [{"sites": "attention"}, {"sites": "attention", "position": "prepend"}]
    if describe(FAMILIES[name].model()).sites[0].attention:
        everywhere.append({"position": "prepend"})
    return everywhere


CASES = [(name, choices) for name in FAMILIES for choices in choices_of(name)]


@pytest.mark.parametrize(("name", "choices"), CASES, ids=str)
def test_fresh_patch_is_the_identity_bit_for_bit(name, choices):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    patch = Patch.create(model, config_for(name, **choices))
    with patch.attach(model):
        assert torch.equal(family.call(model), base)
        drawn(patch)
        assert not torch.allclose(family.call(model), base, atol=1e-3)
    assert torch.equal(family.call(model), base)


@pytest.mark.parametrize(("name", "choices"), CASES, ids=str)
def test_gradients_reach_everything_that_is_learned_and_the_model_keeps_none(name, choices):
    family = FAMILIES[name]
    model = family.model()
    patch = drawn(Patch.create(model, config_for(name, **choices))).train()
    patch.attach(model)
    (family.call(model).square().mean() + patch.balance_loss()).backward()
    for learned, parameter in patch.named_parameters():
        assert parameter.grad is not None, learned
        rows = parameter.grad.flatten(1).abs().amax(dim=1) if parameter.ndim > 1 else parameter.grad.abs()
        assert rows.gt(0).all(), learned
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_and_loaded_patch_gives_the_same_output(name, family, tmp_path):
    model = family.model()
    patch = drawn(Patch.create(model, config_for(name)))
    with patch.attach(model):
        expected = family.call(model)
    patch.save_pretrained(tmp_path)
    with Patch.from_pretrained(tmp_path).attach(model):
        assert torch.equal(family.call(model), expected)


def test_sites_are_where_the_hidden_states_have_the_described_shape(name, family):
    model = family.model()
    backbone = describe(model, config_for(name).sample_size)
    seen = {}
    for site in backbone.sites:

        def note(module, args, kwargs, site=site):
            hidden_states = args[0] if args else kwargs[site.argument]
            seen[site.name] = tuple(hidden_states.shape)

        model.get_submodule(site.module).register_forward_pre_hook(note, with_kwargs=True)
    family.call(model)
    default = [site for site in backbone.sites if site.kind == backbone.sites[0].kind]
    assert len(default) == family.blocks
    assert [site.index for site in default] == list(range(family.blocks))
    for site in backbone.sites:
        shape = seen[site.name]
        if site.layout == "map":
            assert shape == (2, site.channels, *site.grid), site
        else:
            assert shape[2] == site.channels
            more = {"first": 0, "last": 8 + 5, "after_text": 5}[site.image_tokens]
            assert shape[1] == site.num_tokens + more, site


def test_gate_sees_one_row_a_sample_of_the_models_own_timestep_embedding(name, family):
    model = family.model()
    patch = drawn(Patch.create(model, config_for(name))).train()
    taps = []
    model.get_submodule(describe(model).time_tap).register_forward_hook(lambda *call: taps.append(call[2]))
    with patch.attach(model):
        family.call(model)
    weight, bias = patch.gate.weight, patch.gate.bias
    expected = F.linear(torch.cat([taps[0], torch.zeros(2, 1)], dim=1), weight, bias)
    torch.testing.assert_close(patch.last.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(patch.last.logits[0, 0], patch.last.logits[0, 1])


@pytest.mark.parametrize("size", [(12, 12), (8, 12), (12, 4)], ids=str)
def test_other_sizes_and_shapes_are_taken(name, family, size):
    if family.only_square and size[0] != size[1]:
        pytest.skip("the model itself takes squares alone")
    model = family.model()
    base = family.call(model, size=size)
    patch = Patch.create(model, config_for(name))
    with patch.attach(model):
        assert torch.equal(family.call(model, size=size), base)
        output = family.call(drawn_in_place(patch, model), size=size)
    assert output.shape == base.shape
    assert not torch.allclose(output, base, atol=1e-3)


def drawn_in_place(patch, model):
    drawn(patch)
    return model


def test_constant_prompts_are_the_same_shift_at_every_size(name, family):
    """With one prompt everywhere and an equal gate, every token gets prompt / N, at whatever size."""
    model = family.model()
    patch = Patch.create(model, config_for(name, sites="first"))
    site = patch.backbone.sites[0]
    shift = torch.randn(site.channels, generator=torch.Generator().manual_seed(0))
    layout = shift.view(-1, 1, 1) if site.layout == "map" else shift
    with torch.no_grad():
        patch.prompts[0].copy_(layout.expand_as(patch.prompts[0]))
    added = []

    def note(module, args, kwargs):
        added.append((args[0] if args else kwargs[site.argument]).clone())

    module = model.get_submodule(site.module)
    module.register_forward_pre_hook(note, with_kwargs=True)
    patch.attach(model)
    module.register_forward_pre_hook(note, with_kwargs=True)
    for size in (family.size, (12, 12), (16, 16)):
        added.clear()
        family.call(model, size=size)
        before, after = added
        expected = (layout / site.num_tokens).expand_as(before)
        torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-5)


def test_only_tokens_of_the_image_are_prompted(name, family):
    model = family.model()
    patch = drawn(Patch.create(model, config_for(name)))
    patch.attach(model)
    for position, site in enumerate(patch.backbone.sites):
        if site.image_tokens == "first":
            continue
        family.call(model)
        count = math.prod(patch.extent.grid)
        lengths = [5, 2] if site.image_tokens == "after_text" else [13, 13]
        hidden_states = torch.zeros(2, max(lengths) + count, site.channels)
        touched = patch.enter(position, hidden_states).abs().sum(-1) > 0
        expected = torch.zeros_like(touched)
        for row, length in enumerate(lengths):
            expected[row, length : length + count] = True
        assert torch.equal(touched, expected)


def test_images_to_edit_behind_the_image_are_left_alone():
    family = FAMILIES["FluxTransformer2DModel"]
    model = family.model()
    inputs = family.inputs(model, 2, 8, 8)
    ids = inputs["img_ids"].clone()
    ids[:, 0] = 1
    both = {"img_ids": torch.cat([inputs["img_ids"], ids]), "hidden_states": inputs["hidden_states"].repeat(1, 2, 1)}
    patch = drawn(Patch.create(model, config_for("FluxTransformer2DModel")))
    patch.attach(model)
    family.call(model, **both)
    assert patch.extent.grid == (4, 4)
    touched = patch.enter(0, torch.zeros(2, 32, 32)).abs().sum(-1) > 0
    assert touched[:, :16].all()
    assert not touched[:, 16:].any()


def test_every_family_that_is_registered_is_tested_here():
    from stagepatch.families.registry import _FAMILIES

    assert set(_FAMILIES) == {name.split()[0] for name in FAMILIES}


def test_qwenimage_that_embeds_two_timesteps_is_refused():
    family = FAMILIES["QwenImageTransformer2DModel"]
    model = family.model()
    model.register_to_config(zero_cond_t=True)
    with pytest.raises(UserError, match="zero_cond_t"):
        Patch.create(model)


def test_gate_is_asked_once_a_forward(name, family, monkeypatch):
    """Also where the model embeds its timestep again in every block: noise of the gate is drawn once."""
    model = family.model()
    patch = drawn(Patch.create(model, config_for(name, condition="t+c")))
    patch.attach(model)
    observed = []
    observe = patch.observe
    monkeypatch.setattr(patch, "observe", lambda condition: observed.append(condition) or observe(condition))
    family.call(model)
    family.call(model)
    assert len(observed) == 2
