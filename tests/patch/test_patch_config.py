"""Every field of `PatchConfig` has a test below that fails when the option is ignored."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.families import predict
from stagepatch.methods import DMP
from stagepatch.patch import Patch, PatchConfig, balance
from tests.tiny import FAMILIES

COVERED = set()


def covers(*names):
    COVERED.update(names)
    return lambda test: test


def test_every_field_is_covered():
    assert {field.name for field in fields(PatchConfig)} == COVERED


# What differs: paper, released code.
PRESETS = {
    "condition": (None, "t+c"),
    "sites": ("all", 12),
    "hard_weight": ("one", "renormalized"),
    "gate_noise": (False, True),
    "gate_learning_rate_factor": (1.0, 10.0),
    "importance_variance": ("population", "unbiased"),
    "load_loss": ("surrogate", "none"),
}
PAPER, RELEASED = ({name: values[which] for name, values in PRESETS.items()} for which in (0, 1))
SHARED = {"position": "add", "prepending": "gated", "num_prompts": 50, "sample_size": None, "grid": None}
SHARED |= {"initialization": "zero", "initialization_std": 0.02, "num_experts": 1, "matched_step": False}
SHARED |= {"gate": "linear", "block_index": True, "gate_initialization": "zero", "normalization": "softmax"}
SHARED |= {"selection": "soft", "top_k": 0.75, "importance_weight": 1.0, "load_weight": 1.0}
INPUTS = torch.randn(2, 1, 8, 8), torch.tensor([10, 800]), torch.tensor([0, 1])


@covers("preset")
@pytest.mark.parametrize(("preset", "values"), [("paper", PAPER), ("released", RELEASED)])
def test_preset_gives_its_values(preset, values):
    assert asdict(PatchConfig(preset=preset)) == {"preset": preset, **SHARED, **values}


def test_default_is_the_paper(tiny_dit):
    assert Patch.create(tiny_dit()).config == PatchConfig(preset="paper", condition="t")


@pytest.mark.parametrize(("preset", "own", "other"), [("released", RELEASED, PAPER), ("paper", PAPER, RELEASED)])
@pytest.mark.parametrize("name", list(PRESETS))
def test_explicit_value_survives_the_preset_even_where_it_is_the_other_presets(preset, own, other, name):
    given = {name: "t" if other[name] is None else other[name]}  # the paper's condition is left to the model
    config = asdict(PatchConfig(preset=preset, **given))
    assert {key: config[key] for key in PRESETS} == {**own, **given}


def test_saved_config_keeps_resolved_values(tiny_dit, tmp_path):
    config = PatchConfig(preset="released", condition="t", sites=2, top_k=3, num_experts=2)
    Patch.create(tiny_dit(), config).save_pretrained(tmp_path)
    loaded = Patch.from_pretrained(tmp_path).config
    assert loaded == config
    assert (loaded.condition, loaded.sites, loaded.gate_noise, loaded.top_k) == ("t", 2, True, 3)
    assert loaded.gate_initialization == "normal"
    assert PatchConfig.from_dict(asdict(config)) == config


@covers("position", "num_prompts", "prepending")
def test_plainly_prepended_prompts_are_tokens_of_their_own(model, make_patch, patched):
    seen = []
    # The patch's hook comes after the block's here, so look at the attention's input, too.
    for module in (model.blocks[1], model.blocks[1].attn):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    plain = {"position": "prepend", "prepending": "plain", "num_prompts": 7}
    for choices, tokens in [({}, 16), (plain, 16 + 7)]:
        seen.clear()
        patch = make_patch(model, **choices)
        patched(patch)
        assert seen == [(4, 16, 32), (4, tokens, 32)]
    assert [tuple(prompt.shape) for prompt in patch.prompts] == [(7, 32)] * 3
    assert patch.gate.bias.shape == (7,)


@covers("sample_size", "grid")
@pytest.mark.parametrize(
    ("choices", "tokens"),
    [
        *(({"sample_size": size}, tokens) for size, tokens in [(None, 16), (16, 64), ([8, 12], 24)]),
        *(({"grid": grid}, tokens) for grid, tokens in [([2, 2], 4), ([3, 2], 6), ([9, 9], 16)]),
    ],
    ids=str,
)
def test_reference_size_sets_and_grid_bounds_the_number_of_prompts(model, choices, tokens):
    patch = Patch.create(model, PatchConfig(**choices))
    assert (patch.prompts[0].shape, patch.gate.bias.shape) == ((tokens, 32), (tokens,))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"sample_size": [8]}, r"sample_size=\[8\] must be one number, or height and width"),
        ({"grid": [4]}, r"grid=\[4\] must have 2 numbers for DiT"),
    ],
)
def test_size_of_too_few_numbers_is_refused(model, choices, message):
    with pytest.raises(UserError, match=message):
        Patch.create(model, PatchConfig(**choices))


@covers("normalization")
def test_weights_of_mean_one_and_of_sigmoids(model, patched, used_patch):
    weights, logits = {}, None
    for normalization in ("softmax", "mean_one", "sigmoid"):
        patch = used_patch(normalization=normalization)
        weights[normalization], logits = patch.last.weights, patch.last.logits
    torch.testing.assert_close(weights["mean_one"], 16 * weights["softmax"])
    torch.testing.assert_close(weights["sigmoid"], 2 / (1 + torch.exp(-logits)))
    for normalization in ("mean_one", "sigmoid"):
        patch = Patch.create(model, PatchConfig(normalization=normalization, initialization="normal"))
        tuning = Patch.create(model, PatchConfig(gate="none"))
        tuning.prompts.load_state_dict(patch.prompts.state_dict())
        for size in (8, 16):  # at a zero gate both are prompt tuning, at any size
            inputs = torch.randn(2, 1, size, size), *INPUTS[1:]
            torch.testing.assert_close(patched(patch, inputs=inputs), patched(tuning, inputs=inputs))


@covers("matched_step")
def test_matched_step_is_that_of_a_uniform_gate(tiny_dit):
    """One step of Adam moves the mixture as far as with the gate."""
    moved = {}
    for gate in ("linear", "none"):
        model = tiny_dit()
        method = DMP(PatchConfig(gate=gate, matched_step=True, block_index=False))
        groups = [{"params": g["params"], "lr": 0.01 * g["factor"]} for g in method.prepare(model)]
        optimizer = torch.optim.Adam(groups)
        predict(model, *INPUTS).square().sum().mul(1e6).backward()
        optimizer.step()
        share = 1 / 16 if gate == "linear" else 1.0
        moved[gate] = share * method.patch.prompts[0].detach().abs().mean()
    torch.testing.assert_close(moved["none"], moved["linear"], rtol=1e-3, atol=0)


@covers("num_experts")
def test_experts_are_whole_sets_with_a_weight_each(used_patch):
    patch = used_patch(num_experts=4)
    assert [tuple(prompt.shape) for prompt in patch.prompts] == [(4, 16, 32)] * 3
    assert (patch.gate.weight.shape, patch.last.weights.shape) == ((4, 33), (3, 4, 4))
    torch.testing.assert_close(patch.last.weights.sum(-1), torch.ones(3, 4))


@covers("initialization", "initialization_std")
def test_initialization_of_the_prompts(model):
    assert all((prompt == 0).all() for prompt in Patch.create(model, PatchConfig()).prompts)
    for std in (0.02, 3.0):
        normal = Patch.create(model, PatchConfig(initialization="normal", initialization_std=std))
        values = torch.cat([prompt.flatten() for prompt in normal.prompts])
        assert values.std().item() == pytest.approx(std, rel=0.1)
        assert values.mean().abs() < 0.1 * std


@covers("sites")
@pytest.mark.parametrize(
    ("sites", "layers", "expected"),
    [
        *(("all", 4, [0, 1, 2, 3]), ("first", 4, [0]), ("half", 4, [0, 1]), ("half", 3, [0, 1])),
        *((3, 4, [0, 1, 2]), (12, 4, [0, 1, 2, 3]), (["blocks.3", "blocks.1"], 4, [1, 3])),
    ],
    ids=str,
)
def test_sites_name_the_blocks_that_are_patched(tiny_dit, batch, make_patch, tmp_path, sites, layers, expected):
    model = tiny_dit(num_layers=layers)
    patch = make_patch(model, sites=sites)
    assert [site.index for site in patch.backbone.sites] == expected
    assert len(patch.prompts) == len(expected)
    with patch.attach(model):
        hooked = [index for index, block in enumerate(model.blocks) if block._forward_pre_hooks]
        output = predict(model, *batch)
    assert hooked == expected
    assert patch.last.weights.shape[0] == len(expected)
    patch.save_pretrained(tmp_path)
    with Patch.from_pretrained(tmp_path).attach(model):
        assert torch.equal(predict(model, *batch), output)


@covers("gate")
@pytest.mark.parametrize(
    ("gate", "names"),
    [
        ("linear", {"gate.weight", "gate.bias"}),
        ("attention", {"gate.query", "gate.key", "gate.value"}),
        ("learned_keys", {"gate.query_weight", "gate.keys"}),
        ("none", set()),
    ],
)
def test_gate_is_linear_attention_keys_or_none(used_patch, gate, names):
    patch = used_patch(gate=gate)
    assert {name for name, _ in patch.named_parameters() if name.startswith("gate.")} == names
    assert (patch.last is None) == (gate in ("none", "attention"))


@pytest.mark.parametrize(
    ("choices", "needs"),
    [
        ({"block_index": False}, "block_index=True"),
        ({"position": "prepend"}, "position='add'"),
        ({"num_experts": 2, "selection": "hard"}, "num_experts=1, selection='soft'"),
        ({"preset": "released"}, "gate_noise=False"),
    ],
)
def test_attention_to_the_timestep_refuses_what_it_has_no_weights_for(choices, needs):
    with pytest.raises(UserError, match=needs):
        PatchConfig(gate="attention", **choices)


def test_attention_to_the_timestep_refuses_sites_of_several_widths():
    with pytest.raises(UserError, match="needs sites of tokens, all of one width; UNet2DModel has 16, 32 channels"):
        Patch.create(FAMILIES["UNet2DModel"].model(), PatchConfig(gate="attention"))


def test_attention_tells_timesteps_blocks_and_prompts_apart(model, batch, make_patch, patched):
    """With one key alone, the softmax would be 1 and all prompts of a block alike."""
    patch = make_patch(model, gate="attention")
    patched(patch)
    added = torch.stack([patch.gate.attend(patch.prompts[i], patch.sources[i]) for i in range(3)])
    for dim in range(3):  # blocks, samples at their timesteps, prompts
        assert (added.diff(dim=dim).abs().amax(-1) > 1e-3).float().mean() > 0.5
    assert (patch.balance_terms(), float(patch.balance_loss())) == ({}, 0.0)


@covers("block_index")
def test_block_index_makes_the_blocks_mixtures_distinct(used_patch):
    for gate, weight in (("linear", "weight"), ("learned_keys", "query_weight")):
        for block_index, channels in ((True, 33), (False, 32)):
            patch = used_patch(gate=gate, block_index=block_index)
            assert torch.equal(patch.last.logits[0], patch.last.logits[2]) != block_index
            assert getattr(patch.gate, weight).shape[1] == channels


@covers("condition")
def test_condition_t_ignores_the_class_and_t_plus_c_sees_it(model, batch, make_patch, patched):
    sample, timesteps, labels = batch
    for condition, same in (("t", True), ("t+c", False)):
        patch = make_patch(model, condition=condition)
        patched(patch)
        logits = patch.last.logits
        patched(patch, inputs=(sample, timesteps, labels.flip(0)))
        assert torch.equal(patch.last.logits, logits) == same
        patched(patch, inputs=(sample, timesteps.flip(0), labels))
        assert not torch.allclose(patch.last.logits, logits)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("UNet2DConditionModel", "t+c"), ("SD3Transformer2DModel", "t+c"), ("UNet2DModel", "t"), ("DiT", "t")],
)
def test_condition_of_the_paper_is_t_plus_c_in_text_to_image_models(name, expected):
    """Its Table 9, and its defaults: t in the others."""
    model = FAMILIES[name].model()
    assert Patch.create(model).config.condition == expected
    assert Patch.create(model, PatchConfig(condition="t")).config.condition == "t"
    assert Patch.create(model, PatchConfig(preset="released")).config.condition == "t+c"


def test_condition_t_plus_c_of_an_unconditional_model_is_t(tiny_dit, make_patch, patched):
    model = tiny_dit(conditioning="none")
    patches = [make_patch(model, condition=condition) for condition in ("t", "t+c")]
    for patch in patches:
        patched(patch, model)
    assert torch.equal(*(patch.last.logits for patch in patches))


@covers("selection", "top_k")
@pytest.mark.parametrize(
    ("top_k", "chosen"), [(0.75, 12), (0.5, 8), (0.01, 1), (1, 1), (1.0, 1), (3, 3), (16, 16), (99, 16)]
)
def test_hard_selection_takes_the_top_k(top_k, chosen, used_patch):
    patch = used_patch(selection="hard", top_k=top_k)
    selected, logits = patch.last.weights > 0, patch.last.logits
    assert patch.top_k == chosen
    assert (selected.sum(-1) == chosen).all()
    assert torch.equal(selected, logits >= logits.topk(chosen).values[..., -1:])


def test_soft_selection_weighs_every_prompt_whatever_top_k(used_patch):
    patch = used_patch(top_k=3)
    torch.testing.assert_close(patch.last.weights, patch.last.logits.softmax(-1))


@covers("hard_weight")
@pytest.mark.parametrize(("hard_weight", "total"), [("one", 3.0), ("renormalized", 1.0)])
def test_hard_weight_is_one_each_or_one_in_all(hard_weight, total, used_patch):
    patch = used_patch(selection="hard", top_k=3, hard_weight=hard_weight)
    torch.testing.assert_close(patch.last.weights.sum(-1), torch.full((3, 4), total))


@covers("gate_noise")
@pytest.mark.parametrize("gate", ["linear", "learned_keys"])
def test_gate_noise_is_drawn_in_training_alone(model, batch, make_patch, gate, patched):
    patch = make_patch(model, gate=gate, gate_noise=True)
    assert torch.equal(patched(patch), patched(patch))
    assert torch.equal(patch.last.noisy_logits, patch.last.logits)
    patch.train()
    torch.manual_seed(0)
    first = patched(patch)
    last = patch.last
    assert not torch.equal(first, patched(patch))

    torch.manual_seed(0)
    noise = torch.randn(3, 4, 16)
    t = model.t_embedder(batch[1])
    std = F.softplus(t @ patch.gate.noise_weight.T) + 0.01  # without the block's index, as in the released code
    torch.testing.assert_close(last.noise_std, std.expand(3, -1, -1))
    torch.testing.assert_close(last.noisy_logits, last.logits + noise * std)
    torch.testing.assert_close(last.weights, last.noisy_logits.softmax(-1))

    quiet = make_patch(model, gate=gate, gate_noise=False).train()
    assert (quiet.gate.noise_weight, quiet.gate.noise_std(t)) == (None, None)
    assert torch.equal(patched(quiet), patched(quiet))


def test_noise_starts_from_a_zero_weight(tiny_dit):
    assert (Patch.create(tiny_dit(), PatchConfig(gate_noise=True)).gate.noise_weight == 0).all()


@covers("gate_initialization")
@pytest.mark.parametrize(("gate", "name"), [("linear", "weight"), ("learned_keys", "query_weight")])
@pytest.mark.parametrize(
    ("experts", "given", "resolved"),
    [(1, None, "zero"), (2, None, "normal"), (1, "normal", "normal"), (2, "zero", "zero")],
)
def test_gate_initialization(model, gate, name, experts, given, resolved, patched):
    patch = Patch.create(model, PatchConfig(gate=gate, num_experts=experts, gate_initialization=given))
    assert patch.config.gate_initialization == resolved
    assert (getattr(patch.gate, name) == 0).all() == (resolved == "zero")
    patched(patch)
    equal = torch.full_like(patch.last.weights, 1 / patch.num_choices)
    assert torch.allclose(patch.last.weights, equal) == (resolved == "zero")
    if resolved == "zero":
        assert patch.gate_entropy().item() == pytest.approx(math.log(patch.num_choices))


def test_normal_gate_lets_equal_sets_part(model, patched):
    patch = Patch.create(model, PatchConfig(num_experts=2))
    patched(patch).square().mean().backward()
    first, second = patch.prompts[0].grad
    assert not torch.allclose(first, second)


@covers("gate_learning_rate_factor")
def test_gate_learning_rate_factor_reaches_the_gates_group(tiny_dit):
    for choices, factor in [({}, 1.0), ({"preset": "released"}, 10.0), ({"gate_learning_rate_factor": 3.0}, 3.0)]:
        method = DMP(PatchConfig(**choices))
        groups = method.prepare(tiny_dit())
        assert [group["factor"] for group in groups] == [1.0, factor]
        assert {id(tensor) for tensor in groups[1]["params"]} == {id(p) for p in method.patch.gate.parameters()}


@covers("importance_weight", "load_weight")
def test_balance_weights_scale_their_terms(used_patch):
    for importance, load in [(1.0, 1.0), (2.0, 0.5), (0.0, 3.0), (3.0, 0.0)]:
        patch = used_patch(importance_weight=importance, load_weight=load)
        terms = patch.balance_terms()
        expected = importance * terms["importance"] + load * terms["load"]
        assert patch.balance_loss().item() == pytest.approx(expected.item())
        assert min(terms["importance"], terms["load"]) > 0


@covers("importance_variance")
def test_importance_variance_chooses_the_formula(used_patch):
    values = []
    for kind, formula in [("population", balance.importance_loss), ("unbiased", balance.importance_loss_unbiased)]:
        patch = used_patch(importance_variance=kind)
        values.append(patch.balance_terms()["importance"])
        assert torch.equal(values[-1], formula(patch.last.weights))
    assert not torch.allclose(*values)


@covers("load_loss")
def test_load_loss_chooses_the_formula(model, make_patch, patched):
    for kind in ("surrogate", "indicator", "smooth", "none"):
        patch = make_patch(model, load_loss=kind, selection="hard", top_k=4, gate_noise=True).train()
        patched(patch)
        last = patch.last
        expected = {
            "surrogate": balance.load_surrogate(last.noisy_logits),
            "indicator": balance.load_indicator(last.noisy_logits),
            "smooth": balance.load_smooth(last.logits, last.noisy_logits, last.noise_std, 4),
            "none": torch.zeros(()),
        }
        assert len({value.item() for value in expected.values()}) == 4
        assert torch.equal(patch.balance_terms()["load"], expected[kind])


def test_smooth_load_is_zero_where_it_is_not_defined(model, make_patch, patched, used_patch):
    smooth = {"load_loss": "smooth", "selection": "hard", "gate_noise": True}
    everything = make_patch(model, **smooth, top_k=16).train()
    patched(everything)
    without_noise = used_patch(**smooth, top_k=4)
    assert [patch.balance_terms()["load"] for patch in (everything, without_noise)] == [0, 0]


BAD_VALUES = {
    "preset": ["papers", ["paper"]],
    "position": ["append", None],
    "num_prompts": [0, "50", 2.5],
    "prepending": ["softly"],
    "sample_size": [0, [8, -1], "8"],
    "grid": [[0, 4], [2.5, 4], 4],
    "normalization": ["softplus"],
    "matched_step": ["yes"],
    "num_experts": [0, True],
    "sites": ["last", 0, -1, 1.5, True, [], [0, 1]],
    "initialization": ["ones"],
    "initialization_std": [-0.1, math.inf, "0.02"],
    "gate": ["mlp"],
    "block_index": ["no", None],
    "condition": ["c"],
    "selection": ["top"],
    "top_k": [0, -3, 1.5, math.nan, "half"],
    "hard_weight": ["two"],
    "gate_noise": [1],
    "gate_initialization": ["ones"],
    "gate_learning_rate_factor": [-1.0, math.nan],
    "importance_weight": [-1.0, None],
    "importance_variance": ["sample"],
    "load_weight": [math.inf, "1"],
    "load_loss": ["hinge"],
}
BAD = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_value_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}=") as caught:
        PatchConfig(**{name: value})
    assert str(value) in str(caught.value)


def test_bad_values_are_tried_for_every_field():
    assert set(BAD_VALUES) == {field.name for field in fields(PatchConfig)}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"normalization": "sigmoid", "selection": "hard"}, "normalization='sigmoid' is defined for selection='soft'"),
        ({"normalization": "mean_one", "num_experts": 2}, "normalization='mean_one' is defined for .* num_experts=1"),
        ({"gate": "none", "num_experts": 2}, "num_experts=2 needs a gate"),
        ({"load_loss": "smooth"}, "load_loss='smooth'"),
        ({"load_loss": "smooth", "selection": "hard"}, "load_loss='smooth'"),
        ({"load_loss": "smooth", "gate_noise": True}, "load_loss='smooth'"),
    ],
    ids=str,
)
def test_choices_that_exclude_each_other_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        PatchConfig(**choices)


def test_tuples_are_taken_for_lists():
    config = PatchConfig(grid=(2, 2), sample_size=(8, 8), sites=("blocks.1",))
    assert config == PatchConfig(grid=[2, 2], sample_size=[8, 8], sites=["blocks.1"])


def test_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"Unknown key.*: depth, promtps\. Known: block_index, condition"):
        PatchConfig.from_dict({"promtps": 3, "depth": 12})


def test_replace_keeps_what_the_preset_resolved():
    assert replace(PatchConfig(preset="released"), num_prompts=3).sites == 12
