"""What must hold for every family, on tiny models of diffusers' own classes."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.families import describe, predict, registry
from stagepatch.families.packing import unpack
from stagepatch.patch import Patch, PatchConfig
from stagepatch.training.loop import _checkpoint_gradients
from tests.tiny import FAMILIES, FRAMES, TEXT, TEXT_CHANNELS

SIZES = {
    "FluxTransformer2DModel": [8, 8],
    "QwenImageTransformer2DModel": [8, 8],
    "WanTransformer3DModel": [FRAMES, 8, 8],
    "Flux2Transformer2DModel": [8, 8],
    "Flux2Transformer2DModel of klein": [8, 8],
    "ChromaTransformer2DModel": [8, 8],
    "HiDreamImageTransformer2DModel": [8, 8],
    "OvisImageTransformer2DModel": [8, 8],
    "LongCatImageTransformer2DModel": [8, 8],
    "BriaTransformer2DModel": [8, 8],
    "BriaFiboTransformer2DModel": [8, 8],
    "OmniGenTransformer2DModel": [8, 8],
    "ZImageTransformer2DModel": [8, 8],
    "Krea2Transformer2DModel": [8, 8],
    "ErnieImageTransformer2DModel": [8, 8],
    "Ideogram4Transformer2DModel": [8, 8],
    "PRXTransformer2DModel": [8, 8],
    "GlmImageTransformer2DModel": [8, 8],
    "QwenImage21Transformer2DModel": [8, 8],
    "NucleusMoEImageTransformer2DModel": [8, 8],
    "QwenImageTransformer2DModel of edits": [8, 8],
    "QwenImageTransformer2DModel of layers": [3, 8, 8],
    "CogVideoXTransformer3DModel": [FRAMES, 8, 8],
    "HunyuanVideoTransformer3DModel": [FRAMES, 8, 8],
    "HunyuanVideo15Transformer3DModel": [FRAMES, 8, 8],
    "HunyuanImageTransformer2DModel": [8, 8],
    "LTXVideoTransformer3DModel": [FRAMES, 8, 8],
    "LTX2VideoTransformer3DModel": [FRAMES, 8, 8],
    "CosmosTransformer3DModel": [FRAMES, 8, 8],
    "SkyReelsV2Transformer3DModel": [FRAMES, 8, 8],
    "WanVACETransformer3DModel": [FRAMES, 8, 8],
    "MochiTransformer3DModel": [FRAMES, 8, 8],
    "MotifVideoTransformer3DModel": [FRAMES, 8, 8],
    "Kandinsky5Transformer3DModel": [FRAMES, 8, 8],
    "SanaVideoTransformer3DModel": [FRAMES, 8, 8],
}
# Tokens before the image's, where it does not come first, of a batch of two.
LENGTHS = {
    "Lumina2Transformer2DModel": [5, 2],
    "AuraFlowTransformer2DModel": [13, 13],
    "OmniGenTransformer2DModel": [6, 6],
}
# Tokens behind the image's in a list of blocks, where it comes first but not alone.
BEHIND = {
    ("HiDreamImageTransformer2DModel", "single_stream_blocks"): 3 * 5,
    ("ZImageTransformer2DModel", "noise_refiner"): 16,
    ("ZImageTransformer2DModel", "layers"): 16 + 32,
    ("ErnieImageTransformer2DModel", "layers"): 5,
    ("QwenImageTransformer2DModel of layers", "transformer_blocks"): 16,
}


def lengths_of(name, family):
    """Tokens before the image's, of a batch of two."""
    return LENGTHS.get(name) or [family.others or 5] * 2


@pytest.fixture(params=list(FAMILIES))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def model(family):
    return family.model()


def fresh(name, model, **choices):
    return Patch.create(model, PatchConfig(**{"sample_size": SIZES.get(name), **choices}))


def drawn(patch):
    """Every weight of a patch drawn, the prompts large: a mixture that can be seen in the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            std = 20.0 if name.startswith("prompts") else 0.1
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return patch


def entering(site, args, kwargs):
    """Hidden states that enter a block, [B, N, D], or a map."""
    hidden_states = args[0] if args else kwargs[site.argument]
    return hidden_states.transpose(0, 1) if site.layout == "sequence" else hidden_states


def choices_of(name):
    grid = [2] * len(SIZES.get(name, [8, 8]))
    sites = describe(FAMILIES[name].model()).sites
    everywhere = [{}, {"num_experts": 2}, {"condition": "t+c"}, {"grid": grid}, {"gate": "none"}]
    if name.startswith("UNet"):
        everywhere.append({"sites": "attention"})
        if all(site.attention for site in sites if site.kind == "attention"):
            everywhere.append({"sites": "attention", "position": "prepend"})
    if sites[0].attention:
        everywhere.append({"position": "prepend"})
    return everywhere


CASES = [(name, choices) for name in FAMILIES for choices in choices_of(name)]


@pytest.mark.parametrize(("name", "choices"), CASES, ids=str)
def test_fresh_patch_is_the_identity_bit_for_bit(name, choices, shows):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    patch = fresh(name, model, **choices)
    with patch.attach(model):
        assert torch.equal(family.call(model), base)
        drawn(patch)
        assert not torch.allclose(family.call(model), base, atol=1e-3)
    assert torch.equal(family.call(model), base)
    shows("identity", name)


@pytest.mark.parametrize(("name", "choices"), CASES, ids=str)
def test_gradients_reach_everything_that_is_learned_and_the_model_keeps_none(name, choices, shows):
    family = FAMILIES[name]
    model = family.model()
    patch = drawn(fresh(name, model, **choices)).train()
    patch.attach(model)
    (family.call(model).square().mean() + patch.balance_loss()).backward()
    for learned, parameter in patch.named_parameters():
        assert parameter.grad is not None, learned
        rows = parameter.grad.flatten(1).abs().amax(dim=1) if parameter.ndim > 1 else parameter.grad.abs()
        assert rows.gt(0).all(), learned
    assert all(parameter.grad is None for parameter in model.parameters())
    shows("gradients", name)


def test_saved_and_loaded_patch_gives_the_same_output(name, family, model, tmp_path, shows):
    patch = drawn(fresh(name, model))
    with patch.attach(model):
        expected = family.call(model)
    patch.save_pretrained(tmp_path)
    with Patch.from_pretrained(tmp_path).attach(model):
        assert torch.equal(family.call(model), expected)
    shows("saving", name)


def test_sites_are_where_the_hidden_states_have_the_described_shape(name, family, model):
    backbone = describe(model, SIZES.get(name))
    seen = {}
    for site in backbone.sites:

        def note(module, args, kwargs, site=site):
            seen[site.name] = tuple(entering(site, args, kwargs).shape)

        model.get_submodule(site.module).register_forward_pre_hook(note, with_kwargs=True)
    family.call(model)
    default = [site.index for site in backbone.sites if site.kind == backbone.sites[0].kind]
    assert default == list(range(family.blocks))
    for site in backbone.sites:
        shape = seen[site.name]
        if site.layout == "map":
            assert shape == (2, site.channels, *site.grid), site
        else:
            assert shape[2] == site.channels
            more = 0 if site.image_tokens == "first" else max(lengths_of(name, family))
            assert shape[1] == site.num_tokens + BEHIND.get((name, site.module.split(".")[0]), more), site


def test_taps_are_whole_embeddings(name, model):
    """Not layers of them, of which some are as wide."""
    backbone = describe(model, SIZES.get(name))
    for tap in (backbone.time_tap, *backbone.condition_taps):
        kind = type(model.get_submodule(tap)).__name__
        assert any(part in kind for part in ("Embed", "Projection", "AttentionPool", "ChromaApproximator")), tap


def test_the_image_lies_where_the_first_site_says(name, family, model):
    """Before the first block these tokens alone depend on the image."""
    patch = fresh(name, model)
    site = patch.backbone.sites[0]
    if site.layout == "map":
        pytest.skip("has no tokens")
    patch.attach(model)
    seen = []
    module = model.get_submodule(site.module)

    def note(module, args, kwargs):
        seen.append(entering(site, args, kwargs))

    module.register_forward_pre_hook(note, with_kwargs=True)
    key = next(key for key in ("hidden_states", "sample", "x") if key in family.draws)
    torch.manual_seed(5)
    other = family.draws[key](2, *family.size)
    family.call(model)
    family.call(model, **{key: other})
    depends = (seen[0] != seen[1]).any(dim=-1)
    count = math.prod(patch.extent.grid)
    expected = torch.arange(depends.shape[1]) < count
    assert torch.equal(depends, (expected if site.image_tokens == "first" else expected.flip(0)).expand_as(depends))


def test_gate_sees_one_row_a_sample_of_the_models_own_timestep_embedding(name, family, model):
    patch = drawn(fresh(name, model, condition="t")).train()
    taps = []
    model.get_submodule(describe(model).time_tap).register_forward_hook(lambda *call: taps.append(call[2]))
    with patch.attach(model):
        family.call(model)
    embedding = taps[0].mean(dim=1) if taps[0].ndim == 3 else taps[0][:2]
    expected = F.linear(torch.cat([embedding, torch.zeros(2, 1)], dim=1), patch.gate.weight, patch.gate.bias)
    torch.testing.assert_close(patch.last.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(patch.last.logits[0, 0], patch.last.logits[0, 1])


@pytest.mark.parametrize("size", [(12, 12), (8, 12), (12, 4)], ids=str)
def test_other_sizes_and_shapes_are_taken(name, family, model, size, shows):
    if family.only_square and size[0] != size[1]:
        pytest.skip("the model itself takes squares alone")
    base = family.call(model, size=size)
    patch = fresh(name, model)
    with patch.attach(model):
        assert torch.equal(family.call(model, size=size), base)
        drawn(patch)
        output = family.call(model, size=size)
        described = describe(model, [*SIZES.get(name, size)[:-2], *size])
        assert described.begin is None or patch.extent.grid == described.grid  # not turned by 90°
    assert output.shape == base.shape
    assert not torch.allclose(output, base, atol=1e-3)
    shows("sizes", name)


def test_constant_prompts_are_the_same_shift_at_every_size(name, family, model):
    """With one prompt everywhere and an equal gate, every token gets prompt / N, at whatever size."""
    patch = fresh(name, model, sites="first")
    site = patch.backbone.sites[0]
    shift = torch.randn(site.channels, generator=torch.Generator().manual_seed(0))
    layout = shift.view(-1, 1, 1) if site.layout == "map" else shift
    with torch.no_grad():
        patch.prompts[0].copy_(layout.expand_as(patch.prompts[0]))
    added = []

    def note(module, args, kwargs):
        added.append(entering(site, args, kwargs).clone())

    module = model.get_submodule(site.module)
    module.register_forward_pre_hook(note, with_kwargs=True)
    patch.attach(model)
    module.register_forward_pre_hook(note, with_kwargs=True)
    for size in (family.size, (12, 12), (16, 16)):
        added.clear()
        family.call(model, size=size)
        before, after = added
        added_to_all = after - before
        if site.layout != "map":
            count = math.prod(patch.extent.grid)
            others = added_to_all[:, count:] if site.image_tokens == "first" else added_to_all[:, :-count]
            assert not others.any()
            added_to_all = added_to_all[:, :count] if site.image_tokens == "first" else added_to_all[:, -count:]
        expected = (layout / site.num_tokens).expand_as(added_to_all)
        torch.testing.assert_close(added_to_all, expected, rtol=1e-3, atol=1e-5)


def test_only_tokens_of_the_image_are_prompted(name, family, model):
    patch = drawn(fresh(name, model))
    patch.attach(model)
    for position, site in enumerate(patch.backbone.sites):
        if site.image_tokens == "first":
            continue
        family.call(model)
        count = math.prod(patch.extent.grid)
        lengths = lengths_of(name, family)
        hidden_states = torch.zeros(2, max(lengths) + count, site.channels)
        touched = patch.enter(position, hidden_states).abs().sum(-1) > 0
        expected = torch.zeros_like(touched)
        for row, length in enumerate(lengths):
            expected[row, length : length + count] = True
        assert torch.equal(touched, expected)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel", "BriaFiboTransformer2DModel"])
def test_images_to_edit_behind_the_image_are_left_alone(name, family, model):
    inputs = family.inputs(model, 2, 8, 8)
    ids = inputs["img_ids"].clone()
    ids[..., 0] = 10
    both = {
        "img_ids": torch.cat([inputs["img_ids"], ids], dim=-2),
        "hidden_states": inputs["hidden_states"].repeat(1, 2, 1),
        "joint_attention_kwargs": {},
    }
    patch = drawn(fresh(name, model))
    patch.attach(model)
    family.call(model, **both)
    grid = (8, 8) if name.startswith("BriaFibo") else (4, 4)
    assert patch.extent.grid == grid
    count = math.prod(grid)
    for position, site in enumerate(patch.backbone.sites):
        before = 5 if site.image_tokens == "after_text" else 0
        touched = patch.enter(position, torch.zeros(2, before + 2 * count, 32)).abs().sum(-1) > 0
        assert touched[:, before : before + count].all()
        assert touched.sum() == 2 * count


def test_flux2_that_takes_images_to_edit_first_is_refused():
    family = FAMILIES["Flux2Transformer2DModel of klein"]
    model = family.model()
    with fresh("Flux2Transformer2DModel of klein", model).attach(model), pytest.raises(UserError, match="KleinKV"):
        family.call(model, kv_cache_mode="extract", num_ref_tokens=4)


def test_every_family_that_is_registered_is_tested_here():
    assert set(registry._FAMILIES) == {name.split()[0] for name in FAMILIES}


def qwenimage_with(shapes, **changes):
    """A model, and a forward's inputs for those images of each sample."""
    family = FAMILIES["QwenImageTransformer2DModel"]
    tokens = sum(math.prod(shape) for shape in shapes)
    hidden_states = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(0))
    return family.model(**changes), {"hidden_states": hidden_states, "img_shapes": [shapes] * 2}


def rows_touched(patch, tokens):
    return patch.enter(0, torch.zeros(2, tokens, 32)).abs().sum(-1) > 0


def test_qwenimage_that_edits_is_prompted_at_the_image_it_makes_at_the_samples_timesteps():
    """As Qwen-Image-Edit-2511: zero is embedded after the timesteps, for the images that it is given."""
    model, images = qwenimage_with([(1, 4, 4), (1, 2, 4), (1, 2, 2)], zero_cond_t=True)
    family = FAMILIES["QwenImageTransformer2DModel"]
    base = family.call(model, **images)
    patch = fresh("QwenImageTransformer2DModel", model)
    embeddings = []
    model.get_submodule(patch.backbone.time_tap).register_forward_hook(lambda *call: embeddings.append(call[2]))
    patch.attach(model)
    assert torch.equal(family.call(model, **images), base)
    drawn(patch)
    assert not torch.allclose(family.call(model, **images)[:, :16], base[:, :16], atol=1e-3)
    assert patch.extent.grid == (4, 4)
    touched = rows_touched(patch, 28)
    assert touched[:, :16].all()
    assert not touched[:, 16:].any()
    expected = F.linear(torch.cat([embeddings[-1][:2], torch.zeros(2, 1)], dim=1), patch.gate.weight, patch.gate.bias)
    assert len(embeddings[-1]) == 4
    torch.testing.assert_close(patch.last.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_qwenimage_of_layers_is_prompted_at_all_layers_but_not_at_the_picture():
    """As Qwen-Image-Layered: the picture, which is given, comes last."""
    changes = {"use_layer3d_rope": True, "use_additional_t_cond": True}
    model, images = qwenimage_with([(1, 4, 4)] * 3 + [(1, 2, 4)], **changes)
    images["additional_t_cond"] = torch.zeros(2, dtype=torch.long)
    family = FAMILIES["QwenImageTransformer2DModel"]
    base = family.call(model, **images)
    patch = Patch.create(model, PatchConfig(sample_size=[3, 8, 8]))
    patch.attach(model)
    assert torch.equal(family.call(model, **images), base)
    drawn(patch)
    assert not torch.allclose(family.call(model, **images)[:, :48], base[:, :48], atol=1e-3)
    assert patch.extent.grid == (3, 4, 4)
    touched = rows_touched(patch, 56)
    assert touched[:, :48].all()
    assert not touched[:, 48:].any()
    with pytest.raises(UserError, match="layers of a picture"):
        predict(model, torch.zeros(2, 4, 8, 8), torch.ones(2), {})


def test_nucleus_is_told_the_sides_of_its_image():
    """Of one that is not square; it predicts x_start − noise."""
    family = FAMILIES["NucleusMoEImageTransformer2DModel"]
    model = family.model()
    inputs = family.inputs(model, 2, 8, 12)
    expected = -unpack(model(**inputs, return_dict=False)[0], 8, 12)
    sample, timesteps = unpack(inputs.pop("hidden_states"), 8, 12), 1000 * inputs.pop("timestep")
    assert inputs.pop("img_shapes") == [(1, 4, 6)] * 2
    patch = fresh("NucleusMoEImageTransformer2DModel", model)
    with patch.attach(model):
        torch.testing.assert_close(predict(model, sample, timesteps, inputs), expected, rtol=1e-4, atol=1e-5)
        assert patch.extent.grid == (4, 6)


@pytest.mark.parametrize("mode", ["plain", "cached"])
def test_qwenimage21_is_prompted_at_the_image_that_it_makes_behind_those_it_is_given(mode):
    """With and without its cache of text and of images that are given, as its pipeline uses it."""
    family = FAMILIES["QwenImage21Transformer2DModel"]
    model = family.model()
    given = (torch.arange(TEXT + 2) >= TEXT).expand(2, -1)  # 2×4 tokens of an image after the text
    images = {
        "hidden_states": torch.randn(2, 8 + 64, 4, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(2, TEXT + 2, TEXT_CHANNELS, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states_mask": torch.ones(2, TEXT + 2, dtype=torch.bool),
        "img_shapes": [[(1, 2, 4), (1, 8, 8)]] * 2,
        "img_mask": torch.cat([given, torch.ones(2, 16, dtype=torch.bool)], dim=1),
    }

    def call():
        if mode == "plain":
            return family.call(model, **images)[:, -64:]
        cache = QwenImage21KVCache(2)
        family.call(model, **images, kv_cache=cache, kv_cache_mode="extract")
        return family.call(model, **images, kv_cache=cache, kv_cache_mode="cached")[:, -64:]

    base = call()
    patch = fresh("QwenImage21Transformer2DModel", model)
    patch.attach(model)
    assert torch.equal(call(), base)
    drawn(patch)
    patched = call()
    assert not torch.allclose(patched, base, atol=1e-3)
    assert patch.extent.grid == (8, 8)
    touched = rows_touched(patch, TEXT + 8 + 64)
    assert touched[:, -64:].all()
    assert not touched[:, :-64].any()
    mode = "plain"
    torch.testing.assert_close(call(), patched, rtol=1e-3, atol=1e-3)


def test_gate_is_asked_once_a_forward(name, family, model, monkeypatch):
    """Also where the model embeds its timestep again in every block: noise of the gate is drawn once."""
    patch = drawn(fresh(name, model, condition="t+c"))
    patch.attach(model)
    observed, observe = [], patch.observe
    monkeypatch.setattr(patch, "observe", lambda condition: observed.append(condition) or observe(condition))
    family.call(model)
    family.call(model)
    assert len(observed) == 2


def test_a_timestep_a_token_is_taken_where_the_first_frame_is_given():
    """As Wan 2.2 TI2V-5B calls its model: timesteps [B, tokens], zero for those of a first frame that is given."""
    family = FAMILIES["WanTransformer3DModel"]
    model = family.model()
    timesteps = torch.tensor([300.0, 700.0])
    tokens = timesteps.unsqueeze(1).expand(2, FRAMES * 4 * 4).clone()
    given = tokens.clone()
    given[:, : 4 * 4] = 0.0
    base = {name: family.call(model, timestep=value) for name, value in (("all", tokens), ("given", given))}
    torch.testing.assert_close(base["all"], family.call(model, timestep=timesteps))
    patch = fresh("WanTransformer3DModel", model)
    with patch.attach(model):
        assert torch.equal(family.call(model, timestep=given), base["given"])
        drawn(patch)
        seen = {}
        for name, value in (("whole", timesteps), ("all", tokens), ("given", given)):
            patch.train()
            seen[name] = family.call(model, timestep=value)
            seen[name, "gate"] = patch.last.logits
    torch.testing.assert_close(seen["all"], seen["whole"])
    torch.testing.assert_close(seen["given", "gate"], seen["whole", "gate"])
    assert not torch.allclose(seen["given"], base["given"], atol=1e-3)


def test_blocks_recomputed_in_the_backward_pass_give_the_same_gradients(name, family, model):
    """Gradient checkpointing on every family, as `training.gradient_checkpointing` switches it on."""
    if name.startswith(("Chroma", "HunyuanImage")):
        with pytest.raises(UserError, match="that computes the same"):
            _checkpoint_gradients(model, is_alone=True)
        return
    patch = drawn(fresh(name, model)).train()
    patch.attach(model)
    site = model.get_submodule(patch.backbone.sites[-1].module)
    calls = []
    site.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            _checkpoint_gradients(model, is_alone=True)
        calls.clear()
        patch.zero_grad()
        (family.call(model).square().mean() + patch.balance_loss()).backward()
        gradients.append({learned: parameter.grad.clone() for learned, parameter in patch.named_parameters()})
        times = 2 if checkpoints and not name.startswith("UNet") else 1  # a U-Net's stage recomputes its parts
        assert len(calls) == times
    for learned, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][learned], expected, msg=learned)


def test_lists_of_samples_are_patched_where_they_are_of_one_size_and_hold_one_image_each():
    family = FAMILIES["ZImageTransformer2DModel"]
    model = family.model()
    inputs = family.inputs(model, 2, 8, 8)
    drawn(fresh("ZImageTransformer2DModel", model)).attach(model)
    with pytest.raises(UserError, match=r"one size, and got \[\(1, 8, 8\), \(1, 8, 12\)\]"):
        family.call(model, x=[inputs["x"][0], torch.randn(4, 1, 8, 12)])
    with pytest.raises(UserError, match="images to edit"):
        model([[image] for image in inputs["x"]], inputs["t"], [[text] for text in inputs["cap_feats"]])


def test_glm_image_is_patched_without_images_to_edit():
    family = FAMILIES["GlmImageTransformer2DModel"]
    model = family.model()
    caches = GlmImageKVCache(num_layers=2)
    base = family.call(model, kv_caches=caches)
    with fresh("GlmImageTransformer2DModel", model).attach(model):
        assert torch.equal(family.call(model, kv_caches=caches), base)
        caches.set_mode("write")
        with pytest.raises(UserError, match="images to edit"):
            family.call(model, kv_caches=caches)
