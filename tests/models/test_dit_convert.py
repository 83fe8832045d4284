import argparse
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.models import DIT_SIZES, DiT
from stagepatch.models.embeddings import sincos_positions
from tests.models.conftest import randomize

TOLERANCE = 1e-5


def diffusers_dit(seed=0, **overrides):
    """diffusers' DiT, small, all weights drawn from a normal distribution, one embedder in all blocks."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
    channels = {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
    model = randomize(DiTTransformer2DModel(**{**sizes, **channels, **overrides}), seed, std=0.1).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def draw_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    labels = torch.randint(0, 11, (4,), generator=generator)
    labels[0] = 10  # the null label
    return torch.randn(4, 4, 8, 8, generator=generator), timesteps, labels


def assert_equal_predictions(model, reference, seed):
    with torch.no_grad():
        expected, output = (each(*draw_inputs(seed)).sample for each in (reference, model))
    assert output.shape == expected.shape
    assert expected.std() > 0.1
    assert (output - expected).abs().max() < TOLERANCE


OTHER_SHAPES = [{"out_channels": None}, {"out_channels": 4}, {"patch_size": 4}, {"num_layers": 1}, {"norm_eps": 1e-2}]


@pytest.mark.parametrize(
    ("seed", "overrides"), [*((seed, {}) for seed in range(4)), *((0, shape) for shape in OTHER_SHAPES)], ids=str
)
def test_prediction_equals_diffusers(seed, overrides):
    reference = diffusers_dit(seed, **overrides)
    assert_equal_predictions(DiT.from_diffusers(reference), reference, seed)


def test_authors_settings_equal_diffusers_with_these_settings():
    # diffusers' DiT differs from the authors' in two constants: the frequency shift and the norms' epsilon.
    reference = diffusers_dit(norm_eps=1e-6)
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    weights = DiT.from_diffusers(reference).state_dict()
    weights["pos_embed"] = sincos_positions(32, 4, 4)
    assert_equal_predictions(DiT.from_original(weights, num_attention_heads=4), reference, 1)


@torch.no_grad()
def test_non_square_prediction_equals_the_blocks_of_diffusers():
    # diffusers' own forward puts a square together, so its parts are joined here.
    reference = diffusers_dit()
    _, timesteps, labels = draw_inputs(2)
    sample = torch.randn(4, 4, 4, 12)
    tokens = reference.pos_embed.proj(sample).flatten(2).mT + sincos_positions(32, 2, 6)
    for block in reference.transformer_blocks:
        tokens = block(tokens, timestep=timesteps, class_labels=labels)
    embedding = reference.transformer_blocks[0].norm1.emb(timesteps, labels, hidden_dtype=tokens.dtype)
    shift, scale = reference.proj_out_1(F.silu(embedding))[:, None].chunk(2, dim=2)
    tokens = reference.proj_out_2(reference.norm_out(tokens) * (1 + scale) + shift)
    patches = tokens.view(4, 2, 6, 4, 8).permute(0, 4, 3, 1, 2)  # [B, C, p·p, h, w]
    expected = F.pixel_shuffle(patches.reshape(4, 32, 2, 6), 2)
    output = DiT.from_diffusers(reference)(sample, timesteps, labels).sample
    assert (output - expected).abs().max() < TOLERANCE


def test_from_diffusers_is_ready_for_inference_and_owns_its_weights():
    reference = diffusers_dit()
    model = DiT.from_diffusers(reference)
    assert not model.training
    model.x_embedder.proj.weight.data.zero_()
    assert reference.pos_embed.proj.weight.abs().sum() > 0


@pytest.mark.parametrize("part", ["timestep_embedder.linear_1.weight", "class_embedder.embedding_table.weight"])
def test_refuses_embedders_that_differ_between_blocks(part):
    reference = diffusers_dit()
    reference.transformer_blocks[2].norm1.emb.get_parameter(part).data[0, 0] += 1.0
    with pytest.raises(UserError, match=r"block 2 has an embedder of its own"):
        DiT.from_diffusers(reference)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn='geglu'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"out_channels": 3}, "out_channels=3"),
    ],
)
def test_refuses_a_configuration_it_cannot_express(overrides, message):
    with pytest.raises(UserError, match=message):
        DiT.from_diffusers(diffusers_dit(**overrides))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dit.pt"


@pytest.fixture
def state(model):
    """As the authors save it: with the fixed positions."""
    return {**model.state_dict(), "pos_embed": model.positions.clone()}


def assert_same(loaded, model):
    assert not loaded.training
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    same = ("sample_size", "patch_size", "in_channels", "hidden_size", "num_layers", "num_attention_heads")
    same += ("mlp_ratio", "conditioning", "learn_sigma", "downscale_freq_shift", "norm_eps")
    assert {name: loaded.config[name] for name in same} == {name: model.config[name] for name in same}


def read(source):
    return DiT.from_original(source, num_attention_heads=4)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"ema": state},
        lambda state: {"model": state},
        lambda state: {"model": {name: tensor + 1 for name, tensor in state.items()}, "ema": state},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["bare", "ema", "model", "ema before model", "of distributed training"],
)
@pytest.mark.parametrize("kind", ["state dict", "path", "text"])
def test_reads_a_state_dict_or_a_pt_file(model, state, path, nest, kind):
    torch.save(nest(state), path)
    loaded = read({"state dict": nest(state), "path": path, "text": str(path)}[kind])
    assert_same(loaded, model)
    assert loaded.config.num_classes == 10
    assert torch.equal(loaded.positions, model.positions)


def test_reads_a_safetensors_file(model, state, tmp_path):
    save_file(state, tmp_path / "dit.safetensors")
    assert_same(read(tmp_path / "dit.safetensors"), model)


def test_reads_the_sample_size_from_the_positions(make_dit):
    model = make_dit(sample_size=12)
    state = model.state_dict() | {"pos_embed": model.positions}
    assert read(state).config.sample_size == 12


def test_without_positions_the_sample_size_is_that_of_256_pixels(model):
    loaded = read(model.state_dict())
    assert loaded.config.sample_size == 32
    sample = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([1, 10])
    assert torch.equal(loaded(sample, 5, labels).sample, model(sample, 5, labels).sample)


@pytest.mark.parametrize("conditioning", ["none", "class", "text"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_infers_conditioning_and_learned_sigma(make_dit, conditioning, learn_sigma):
    model = make_dit(conditioning=conditioning, learn_sigma=learn_sigma, sample_size=32)
    assert_same(read(model.state_dict()), model)


@pytest.mark.parametrize("mlp_size", [61, 32, 200])
def test_infers_any_width_of_the_mlp(make_dit, mlp_size):
    # 28·(61/28) is 60.999…: it must not be cut off.
    model = make_dit(hidden_size=28, mlp_ratio=mlp_size / 28, sample_size=32)
    assert model.blocks[0].mlp.fc1.out_features == mlp_size
    assert_same(read(model.state_dict()), model)


@pytest.mark.parametrize(("name", "heads"), [("DiT-S/8", 6), ("DiT-B/4", 12), ("DiT-L/2", 16), ("DiT-XL/2", 16)])
def test_infers_the_heads_of_a_named_size(name, heads):
    with torch.device("meta"):
        model = DiT.from_name(name)
        # On the meta device nothing is copied, and nothing needs to be: the sizes are the test.
        loaded = DiT.from_original(model.state_dict())
    assert loaded.config.num_attention_heads == heads
    assert {key: loaded.config[key] for key in DIT_SIZES[name]} == DIT_SIZES[name]


def test_asks_for_the_heads_of_an_unnamed_size(state):
    with pytest.raises(UserError, match=r"width 32 and 2 layers.*pass num_attention_heads"):
        DiT.from_original(state)


def test_names_the_first_missing_key(state):
    del state["blocks.1.attn.proj.bias"], state["final_layer.linear.bias"]
    with pytest.raises(UserError, match=r"2 keys are missing, first 'blocks.1.attn.proj.bias'"):
        read(state)


def test_names_a_weight_of_another_shape(state):
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(5, 5)
    with pytest.raises(UserError, match=r"'blocks.1.mlp.fc1.weight' is \[5, 5\], expected \[128, 32\]"):
        read(state)


def changed(state, old, *new):
    """A state dict with a tensor under other names."""
    value = state.pop(old)
    return {**state, **dict.fromkeys(new, value)}


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"blocks.{number}.attn.proj.bias"
            for number in ("0\0\0\0\0n", "", "-1", "1_0", "１", "01", "1e3", " 1", "x")
        ),
        *("blocks.", "blocks.1", "blocks.attn.proj.bias"),
    ],
)
def test_names_a_block_that_has_no_number(state, name):
    with pytest.raises(UserError, match=f"'{re.escape(name)}' is of a block without a number"):
        read(changed(state, "blocks.1.attn.proj.bias", name))


@pytest.mark.parametrize("number", ["3", "99999999999", "9" * 5000])
def test_blocks_that_are_not_numbered_on_are_not_made(state, number):
    with pytest.raises(UserError, match=r"it has no 'blocks.2', but 'blocks."):
        read(state | {f"blocks.{number}.attn.proj.bias": torch.zeros(32)})


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "y_embedder.y_proj.fc1.weight", "final_layer.scale"])
def test_names_a_tensor_that_another_model_has(state, name):
    with pytest.raises(UserError, match=f"1 keys are none of a DiT's, first '{name}'"):
        read(state | {name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x_embedder.proj.weight", (32,), r"expected \[D, C, p, p\]"),
        ("x_embedder.proj.weight", (32, 3, 2, 4), r"expected \[32, 3, 2, 2\]"),
        ("x_embedder.proj.weight", (0, 3, 2, 2), r"expected \[D, C, p, p\]"),
        ("final_layer.linear.weight", (), r"expected \[p·p·C, D\]"),
        ("blocks.0.mlp.fc1.weight", (), r"expected \[M, D\]"),
        ("blocks.0.mlp.fc1.weight", (0, 32), r"expected \[M, D\]"),
        ("pos_embed", (), r"expected \[1, N, D\]"),
        ("pos_embed", (16, 32), r"expected \[1, N, D\]"),
        ("pos_embed", (1, 17, 32), "expected a square's tokens of 32 channels"),
        ("pos_embed", (1, 10**14, 1), "expected a square's tokens of 32 channels"),
        ("y_embedder.embedding_table.weight", (), r"expected \[classes \+ 1, D\]"),
        ("y_embedder.embedding_table.weight", (0, 32), r"expected \[classes \+ 1, D\]"),
    ],
    ids=str,
)
def test_names_a_weight_of_another_rank(state, name, shape, message):
    with pytest.raises(UserError, match=f"'{name}' is .*{message}"):
        read(state | {name: torch.zeros(()).expand(shape)})


def test_names_a_text_projection_of_another_rank(make_dit):
    state = make_dit(conditioning="text").state_dict() | {"y_embedder.proj.weight": torch.zeros(32)}
    with pytest.raises(UserError, match=r"'y_embedder.proj.weight' is \[32\], expected \[D, E\]"):
        read(state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_names_weights_that_are_no_floating_point(state, dtype):
    state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"].to(dtype)
    with pytest.raises(UserError, match=rf"'blocks.1.mlp.fc2.bias' is {dtype}, expected floating point"):
        read(state)


def test_half_precision_becomes_float32(model, state):
    loaded = read({name: value.bfloat16() for name, value in state.items()})
    assert torch.equal(loaded.blocks[1].mlp.fc2.bias, model.blocks[1].mlp.fc2.bias.bfloat16().float())


def test_what_is_no_tensor_is_no_weight(state):
    with pytest.raises(UserError, match=r"no key 'x_embedder.proj.weight'"):
        read(state | {"x_embedder.proj.weight": 5})
    with pytest.raises(UserError, match="17 is no name of a tensor"):
        read({"ema": {**state, 17: torch.zeros(1)}})


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(1).expand(3 * 32, 2**35), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["larger than stored", "sparse", "without numbers"],
)
def test_names_a_tensor_that_its_file_does_not_hold(state, path, odd):
    torch.save(state | {"blocks.1.attn.qkv.weight": odd}, path)
    with pytest.raises(UserError, match=r"dit.pt' .*'blocks.1.attn.qkv.weight'"):
        read(path)


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"down_blocks.0.weight": torch.zeros(1)}])
def test_refuses_what_is_no_dit(state):
    with pytest.raises(UserError, match="Not a DiT checkpoint"):
        DiT.from_original(state)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors"])
def test_names_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(UserError, match=f"No such .*{name}"):
        DiT.from_original(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_a_truncated_file_wherever_it_ends(state, path, zipped):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in [*range(0, 200, 9), *range(200, len(whole) - 1, len(whole) // 40)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"dit.pt.*truncated"):
            read(path)


def test_refuses_a_truncated_safetensors_file(state, tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read(path)


def test_refuses_a_web_page_saved_as_a_checkpoint(path):
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(UserError, match="Cannot read"):
        DiT.from_original(path)


class Trap:
    """Runs code when an unpickler builds it."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


PYTHON_OBJECTS = r"Python objects.*save its state dict by itself"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": argparse.Namespace(lr=1e-4)}, PYTHON_OBJECTS),
        ({"args": Trap()}, PYTHON_OBJECTS),
        ([torch.zeros(1)], "holds list, not a state dict"),
    ],
)
def test_refuses_what_is_no_mapping_of_tensors_and_runs_no_code(state, path, content, message):
    torch.save({"ema": state, **content} if isinstance(content, dict) else content, path)
    with pytest.raises(UserError, match=message):
        read(path)
    assert not Trap.sprung
