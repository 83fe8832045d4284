"""Checkpoints of the papers' released code: the DiT and its prompts in one state dict."""

import pytest
import torch
from safetensors.torch import save_file

from stagepatch.core.errors import UserError
from stagepatch.families import predict
from stagepatch.patch import Patch

L, N, D = 3, 16, 32
NEEDED = ["prompt_embeddings", "gate.weight", "gate.bias"]


@pytest.fixture
def checkpoint(tiny_dit):
    generator = torch.Generator().manual_seed(5)
    state = dict(tiny_dit().state_dict())
    shapes = {"prompt_embeddings": (L, N, D), "gate.weight": (N, D + 1), "gate.bias": (N,), "w_noise": (N, D + 1)}
    return state | {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_released_checkpoint_becomes_a_patch_of_the_released_preset(checkpoint):
    patch = Patch.from_released(checkpoint)
    assert (patch.config.preset, patch.config.condition, patch.config.gate_noise) == ("released", "t+c", True)
    assert [site.name for site in patch.backbone.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    assert not patch.training
    read = [torch.stack(list(patch.prompts)), patch.gate.weight, patch.gate.bias, patch.gate.noise_weight]
    for tensor, name in zip(read, [*NEEDED, "w_noise"], strict=True):
        assert torch.equal(tensor, checkpoint[name])


def test_released_patch_on_its_dit_is_equation_3_with_the_class_in_the_gate(model, batch, checkpoint):
    sample, timesteps, labels = batch
    condition = model.t_embedder(timesteps) + model.y_embedder(labels)
    hidden_states = model.x_embedder(sample) + model.positions
    for index, block in enumerate(model.blocks):
        features = torch.cat([condition, torch.full((4, 1), float(index))], dim=1)
        mask = (features @ checkpoint["gate.weight"].T + checkpoint["gate.bias"]).softmax(dim=1)
        hidden_states = block(hidden_states + mask[:, :, None] * checkpoint["prompt_embeddings"][index], condition)
    expected = model._unpatchify(model.final_layer(hidden_states, condition), (4, 4))
    Patch.from_released(checkpoint).attach(model)
    torch.testing.assert_close(predict(model, *batch), expected, rtol=1e-4, atol=1e-4)


def test_noise_weight_of_either_orientation_is_read(checkpoint):
    transposed = {**checkpoint, "w_noise": checkpoint["w_noise"].T.contiguous()}
    assert torch.equal(Patch.from_released(transposed).gate.noise_weight, checkpoint["w_noise"])


@pytest.mark.parametrize("key", ["ema", "model"])
def test_state_dict_under_a_key_is_found(checkpoint, key):
    patch = Patch.from_released({key: checkpoint, "opt": {}})
    assert torch.equal(patch.prompts[2], checkpoint["prompt_embeddings"][2])


def test_ema_is_preferred_to_the_raw_weights(checkpoint):
    raw = {**checkpoint, "gate.bias": torch.zeros(N)}
    assert torch.equal(Patch.from_released({"model": raw, "ema": checkpoint}).gate.bias, checkpoint["gate.bias"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_is_read_from_a_file(checkpoint, tmp_path, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    if suffix == ".pt":
        torch.save({"ema": {f"module.{name}": tensor for name, tensor in checkpoint.items()}}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.items()}, path)
    for source in (path, str(path)):
        assert torch.equal(Patch.from_released(source).prompts[1], checkpoint["prompt_embeddings"][1])


def test_checkpoint_without_noise_or_index_or_classes(checkpoint):
    checkpoint.pop("w_noise")
    checkpoint["gate.weight"] = checkpoint["gate.weight"][:, :D]
    state = {name: tensor for name, tensor in checkpoint.items() if not name.startswith("y_embedder.")}
    patch = Patch.from_released(state)
    assert (patch.config.gate_noise, patch.config.block_index) == (False, False)
    assert patch.backbone.condition_taps == ()
    assert patch.gate.weight.shape == (N, D)


def test_fewer_prompts_than_blocks_patch_the_first_blocks(tiny_dit, checkpoint):
    checkpoint["prompt_embeddings"] = checkpoint["prompt_embeddings"][:2]
    patch = Patch.from_released(checkpoint)
    assert len(patch.prompts) == 2
    patch.attach(tiny_dit()).detach()


def test_released_patch_saves_and_loads_as_any_other(checkpoint, tmp_path, patched):
    patch = Patch.from_released(checkpoint)
    patch.save_pretrained(tmp_path)
    assert torch.equal(patched(patch), patched(Patch.from_pretrained(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, f"released code: no {name} in it") for name in NEEDED),
        (dict.fromkeys([*NEEDED, "w_noise"]), "no prompt_embeddings, gate.weight, gate.bias in it"),
        ({"prompt_embeddings": torch.zeros(L * N, D)}, r"prompt_embeddings is \[48, 32\], expected \[L, N, D\]"),
        ({"prompt_embeddings": torch.zeros(L, 15, D)}, r"prompts.blocks.0 is \(15, 32\)"),
        ({"gate.weight": torch.zeros(N)}, r"gate.weight \[16\], expected \[N, D\+1\]"),
        ({"gate.weight": torch.zeros(N, 50)}, r"gate.weight is \(16, 50\)"),
        ({"gate.bias": torch.zeros(3)}, r"gate.bias is \(3,\), expected \(16,\)"),
        ({"w_noise": torch.zeros(5, 5)}, r"gate.noise_weight is \(5, 5\)"),
    ],
    ids=str,
)
def test_missing_key_or_wrong_shape_is_named(checkpoint, changes, message):
    state = {name: tensor for name, tensor in {**checkpoint, **changes}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        Patch.from_released(state)


def test_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(UserError, match="No such checkpoint"):
        Patch.from_released(tmp_path / "nothing.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match=r"Cannot read '.*broken.pt'"):
        Patch.from_released(tmp_path / "broken.pt")
