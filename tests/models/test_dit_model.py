import math
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.models import DIT_SIZES, DiT
from tests.models.conftest import SMALL


def inputs(height=8, width=8):
    sample = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return sample, torch.tensor([7, 107]), torch.tensor([0, 1])


# arXiv 2212.09748 gives 33M, 130M, 458M and 675M; exactly, without the fixed positions:
@pytest.mark.parametrize(
    ("name", "count"),
    [("DiT-S/2", 32_865_056), ("DiT-B/2", 130_315_808), ("DiT-L/2", 457_840_672), ("DiT-XL/2", 674_834_720)],
)
def test_named_size_has_the_papers_parameter_count(name, count):
    with torch.device("meta"):
        model = DiT.from_name(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_every_named_size_is_what_its_name_says():
    assert {name.split("/")[0] for name in DIT_SIZES} == {"DiT-S", "DiT-B", "DiT-L", "DiT-XL"}
    assert all(int(name.split("/")[1]) == size["patch_size"] for name, size in DIT_SIZES.items())


def test_from_name_takes_overrides():
    with torch.device("meta"):
        model = DiT.from_name("DiT-S/4", num_layers=1, conditioning="none")
    assert (model.config.hidden_size, model.config.patch_size, len(model.blocks)) == (384, 4, 1)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"DiT-H/2.*DiT-S/2.*DiT-XL/8"):
        DiT.from_name("DiT-H/2")


def test_parameter_names_are_those_of_the_authors_checkpoints(model):
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1", *(f"blocks.{index}.{name}" for index in range(2) for name in block)]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(model.state_dict()) == expected | {"y_embedder.embedding_table.weight"}


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 6), (False, 3)])
def test_learned_sigma_doubles_the_output_channels(make_dit, learn_sigma, channels):
    assert make_dit(learn_sigma=learn_sigma)(*inputs()).sample.shape == (2, channels, 8, 8)


def test_tokens_lie_one_after_another_in_memory(model):
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0].is_contiguous()))
    model(*inputs())
    assert seen == [True, True]  # else every norm would copy them


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (12, 4), (16, 16)])
def test_takes_any_height_and_width(model, height, width):
    assert model(*inputs(height, width)).sample.shape == (2, 6, height, width)


def test_output_patch_lies_where_its_input_patch_lies(model):
    # Without attention a token sees itself alone, so a changed patch may change the same patch of the output only.
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    sample, timesteps, labels = inputs(4, 12)
    changed = sample.clone()
    changed[:, :, 2:4, 8:10] += 1.0
    differs = (model(sample, timesteps, labels).sample != model(changed, timesteps, labels).sample).any(1)[0]
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[2:4, 8:10] = True
    assert torch.equal(differs, expected)


def test_a_grid_other_than_the_trained_one_gets_the_same_positions(make_dit):
    # A model made for 16×8 would have the grid as its own: only the buffer differs.
    small, large = (make_dit(sample_size=size)(*inputs(16, 16)).sample for size in (8, 16))
    assert torch.equal(small, large)


def test_one_timestep_stands_for_the_batch(model):
    sample, _, labels = inputs()
    expected = model(sample, torch.tensor([300, 300]), labels).sample
    for timestep in (300, 300.0, torch.tensor(300), torch.tensor([300])):
        assert torch.equal(model(sample, timestep, labels).sample, expected)


def test_returns_a_tuple_on_request(model):
    (output,) = model(*inputs(), return_dict=False)
    assert torch.equal(output, model(*inputs()).sample)


def test_starts_as_the_identity_and_answers_zero():
    model = DiT(**SMALL)
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[1](tokens, torch.randn(2, 32), (4, 4)), tokens)
    assert model(*inputs()).sample.eq(0).all()


def test_linear_layers_start_within_xaviers_bounds():
    model = DiT(**{**SMALL, "num_classes": 1000})
    for weight, fans in [(model.blocks[0].attn.qkv.weight, 32 + 96), (model.x_embedder.proj.weight, 12 + 32)]:
        bound = math.sqrt(6 / fans)
        assert 0.9 * bound < weight.abs().max() <= bound


def test_embeddings_start_with_the_authors_deviation():
    model = DiT(**{**SMALL, "num_classes": 1000})
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.y_embedder.embedding_table):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_unconditional_model_needs_no_labels(make_dit):
    sample, timesteps, _ = inputs()
    model = make_dit(conditioning="none")
    assert model.y_embedder is None
    assert model(sample, timesteps).sample.shape == (2, 6, 8, 8)


def test_class_and_timestep_change_the_prediction(model):
    sample, timesteps, labels = inputs()
    output = model(sample, timesteps, labels).sample
    other_label = model(sample, timesteps, torch.tensor([labels[0], 9])).sample
    assert torch.allclose(output[0], other_label[0], atol=1e-6)
    assert not torch.allclose(output[1], other_label[1], atol=1e-3)
    assert not torch.allclose(output, model(sample, timesteps + 50, labels).sample, atol=1e-3)


def test_null_label_is_the_last_row_of_the_table(model):
    sample, timesteps, _ = inputs()
    null = model(sample, timesteps, torch.tensor([10, 10])).sample
    table = model.y_embedder.embedding_table.weight.data
    table[3] = table[10]
    assert torch.equal(null, model(sample, timesteps, torch.tensor([3, 3])).sample)


def test_text_row_of_nan_takes_the_null_text(make_dit):
    model, (sample, timesteps, _) = make_dit(conditioning="text"), inputs()
    first, second = torch.randn(2, 6)
    given, dropped, null = (
        model(sample, timesteps, pooled_projections=torch.stack([first, row])).sample
        for row in (second, second * math.nan, model.y_embedder.null)
    )
    assert torch.equal(dropped, null)
    assert not torch.allclose(dropped[1], given[1], atol=1e-3)


def test_text_row_of_nan_leaves_gradients_finite(make_dit):
    model, (sample, timesteps, _) = make_dit(conditioning="text"), inputs()
    text = torch.stack([torch.randn(6), torch.full((6,), math.nan)])
    model(sample, timesteps, pooled_projections=text).sample.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.y_embedder.null.grad.abs().sum() > 0


CONDITIONS = {  # the argument, a value, and what stands for none
    "class": ("class_labels", torch.tensor([3]), torch.tensor([10])),
    "text": ("pooled_projections", torch.ones(1, 6), torch.full((1, 6), math.nan)),
}


def conditioning_seen_by_blocks(model, batch, null=False):
    name, *values = CONDITIONS[model.config.conditioning]
    seen = []
    with torch.no_grad(), ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_pre_hook(lambda _, args: seen.append(args[1])))
        model(torch.zeros(batch, 3, 8, 8), 5, **{name: values[null].repeat_interleave(batch, dim=0)})
    return seen


def dropped_rows(model, seen):
    null = conditioning_seen_by_blocks(model.eval(), 1, null=True)[0]
    return torch.isclose(seen, null, atol=1e-5).all(dim=1)


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize(("training", "share"), [(True, 0.3), (False, 0.0)])
def test_drops_the_given_share_of_conditions_in_train_mode_alone(make_dit, conditioning, training, share):
    model = make_dit(conditioning=conditioning, class_dropout_prob=0.3, patch_size=8).train(training)
    torch.manual_seed(0)
    draws = 5000
    seen = conditioning_seen_by_blocks(model, draws)
    dropped = dropped_rows(model, seen[0]).float().mean().item()
    assert abs(dropped - share) <= 4 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_draws_dropout_once_per_forward_for_all_blocks(make_dit, conditioning):
    model = make_dit(conditioning=conditioning, class_dropout_prob=0.5, patch_size=8, num_layers=3).train()
    torch.manual_seed(0)
    first, second = (conditioning_seen_by_blocks(model, 64) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(seen, first[0]) for seen in first)
    assert not torch.equal(first[0], second[0])


def test_no_dropout_means_no_null_row(make_dit):
    model = make_dit(class_dropout_prob=0.0).train()
    assert model.y_embedder.embedding_table.weight.shape == (10, 32)
    seen = conditioning_seen_by_blocks(model, 50)[0]
    assert torch.allclose(seen, seen[:1].expand_as(seen))


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(model):
    forwards = []
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))

    def gradients():
        model.zero_grad()
        forwards.clear()
        model(*inputs()).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()], len(forwards)

    expected, calls = gradients()
    model.enable_gradient_checkpointing()
    checkpointed, calls_checkpointed = gradients()
    assert (calls, calls_checkpointed) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(expected, checkpointed, strict=True))


@pytest.mark.parametrize("conditioning", ["none", "class", "text"])
def test_save_and_load_is_exact(make_dit, tmp_path, conditioning):
    model = make_dit(conditioning=conditioning, downscale_freq_shift=1.0, mlp_ratio=2.5)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert dict(loaded.config).items() >= config.items()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    sample, timesteps, labels = inputs()
    condition = {"none": {}, "class": {"class_labels": labels}, "text": {"pooled_projections": sample[:, 0, 0, :6]}}
    one, other = (each(sample, timesteps, **condition[conditioning]).sample for each in (model, loaded))
    assert torch.equal(one, other)


def test_loaded_positions_are_real_and_right(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.positions.device.type == "cpu"
    assert torch.equal(loaded.positions, model.positions)
    assert "positions" not in model.state_dict()
    assert not loaded.training


@pytest.mark.parametrize("height", [8, 4])
def test_runs_in_bfloat16(model, height):
    sample, timesteps, labels = inputs(height)
    expected = model(sample, timesteps, labels).sample
    output = model.to(torch.bfloat16)(sample.bfloat16(), timesteps, labels).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"hidden_size": 34, "num_attention_heads": 2}, "of 4"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"sample_size": 9}, "sample_size=9"),
        ({"conditioning": "sound"}, "'sound' is none of"),
    ],
)
def test_refuses_sizes_that_do_not_fit(make_dit, arguments, message):
    with pytest.raises(UserError, match=message):
        make_dit(**arguments)


SAMPLE, STEPS, LABELS = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("conditioning", "arguments", "message"),
    [
        ("class", (SAMPLE[..., :7, :], STEPS, LABELS), "7×8"),
        ("class", (torch.zeros(2, 4, 8, 8), 1, LABELS), r"expected \[B, 3, H, W\]"),
        ("class", (torch.zeros(3, 8, 8), 1, LABELS), r"expected \[B, 3, H, W\]"),
        ("class", (SAMPLE, torch.zeros(3), LABELS), "Timesteps of shape"),
        ("class", (SAMPLE, torch.zeros(2, 1), LABELS), "Timesteps of shape"),
        ("class", (SAMPLE, STEPS), "pass `class_labels`"),
        ("text", (SAMPLE, STEPS), "pass `pooled_projections`"),
        ("class", (SAMPLE, STEPS, torch.zeros(3).long()), r"expected \[2\]"),
        ("class", (SAMPLE, STEPS, torch.zeros(2, 1).long()), r"expected \[2\]"),
        ("text", (SAMPLE, STEPS, None, True, torch.zeros(2, 5)), r"expected \[2, 6\]"),
        ("text", (SAMPLE, STEPS, None, True, torch.zeros(6)), r"expected \[2, 6\]"),
    ],
)
def test_refuses_inputs_that_it_does_not_take(make_dit, conditioning, arguments, message):
    with pytest.raises(UserError, match=message):
        make_dit(conditioning=conditioning)(*arguments)
