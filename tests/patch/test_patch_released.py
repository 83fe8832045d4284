"""Checkpoints of the papers' released code: the DiT and its prompts in one state dict."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.core.errors import UserError
from stagepatch.families import predict
from stagepatch.patch import Patch

L, N, D = 3, 16, 32
NEEDED = ["prompt_embeddings", "gate.weight", "gate.bias"]


@pytest.fixture
def checkpoint(tiny_dit):
    """As the released code names and shapes its tensors: a linear layer of D + 1, noise of a bare parameter."""
    torch.manual_seed(5)
    gate = torch.nn.Linear(D + 1, N)
    state = {"prompt_embeddings": torch.randn(L, N, D), "w_noise": torch.randn(D, N)}
    state |= {f"gate.{name}": 3.0 * value.detach() for name, value in gate.named_parameters()}
    return dict(tiny_dit().state_dict()) | state


def released_forward(model, state, batch, top_k=1.0):
    """The released model's forward, from its facts: softmax over the top k of the gate's logits, zeros elsewhere."""
    sample, timesteps, labels = batch
    condition = model.t_embedder(timesteps) + model.y_embedder(labels)
    hidden_states = model.x_embedder(sample) + model.positions
    for index, block in enumerate(model.blocks):
        if index < len(state["prompt_embeddings"]):
            added = state["prompt_embeddings"][index].unsqueeze(0)
            if "gate.weight" in state:
                features = torch.cat([condition, torch.full((len(sample), 1), float(index))], dim=1)
                logits = features @ state["gate.weight"].T + state["gate.bias"]
                rank = logits.argsort(dim=1, descending=True).argsort(dim=1)
                exponentials = torch.where(rank < int(top_k * N), logits.exp(), 0.0)
                added = added * (exponentials / exponentials.sum(dim=1, keepdim=True)).unsqueeze(-1)
            hidden_states = hidden_states + added
        hidden_states = block(hidden_states, condition, (4, 4))
    return model._unpatchify(model.final_layer(hidden_states, condition), (4, 4))


CASES = {
    "soft": {},
    "hard, three quarters": {"top_k": 0.75},
    "first blocks": {"blocks": 2},
    "hard, first block": {"top_k": 0.75, "blocks": 1},
    "plain prompts": {"drop": ["gate.weight", "gate.bias", "w_noise"]},
    "without noise": {"drop": ["w_noise"]},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_released_models(model, batch, checkpoint, case):
    choices = {"top_k": 1.0, "blocks": L, "drop": [], **CASES[case]}
    state = {name: value for name, value in checkpoint.items() if name not in choices["drop"]}
    state["prompt_embeddings"] = state["prompt_embeddings"][: choices["blocks"]]
    base = predict(model, *batch)
    expected = released_forward(model, state, batch, choices["top_k"])
    patch = Patch.from_released(state, choices["top_k"])
    with patch.attach(model):
        torch.testing.assert_close(predict(model, *batch), expected, rtol=2e-4, atol=2e-4)
        assert not torch.allclose(base, expected, atol=1e-2)
        # All cases differ from the soft one, or this says nothing of them.
        if case not in ("soft", "without noise"):
            assert not torch.allclose(released_forward(model, checkpoint, batch), expected, atol=1e-2)


def test_the_noise_in_training_is_of_the_condition_without_the_index(model, batch, checkpoint):
    patch = Patch.from_released(checkpoint).train()
    patch.attach(model)
    predict(model, *batch)
    condition = model.t_embedder(batch[1]) + model.y_embedder(batch[2])
    expected = torch.log1p((condition @ checkpoint["w_noise"]).exp()) + 1e-2
    torch.testing.assert_close(patch.last.noise_std, expected.expand(L, -1, -1), rtol=2e-4, atol=2e-4)


def test_released_checkpoint_becomes_a_patch_of_the_released_preset(checkpoint):
    patch = Patch.from_released(checkpoint)
    assert (patch.config.preset, patch.config.condition, patch.config.gate_noise) == ("released", "t+c", True)
    assert [site.name for site in patch.backbone.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    assert not patch.training
    read = [torch.stack(list(patch.prompts)), patch.gate.weight, patch.gate.bias, patch.gate.noise_weight.T]
    for tensor, name in zip(read, [*NEEDED, "w_noise"], strict=True):
        assert torch.equal(tensor, checkpoint[name])


def test_noise_of_a_square_model_is_not_read_the_other_way_round(tiny_dit):
    state = dict(tiny_dit(hidden_size=16).state_dict())
    noise = torch.randn(N, N)  # D = N
    state |= {"prompt_embeddings": torch.randn(L, N, N), "w_noise": noise}
    state |= {"gate.weight": torch.randn(N, N + 1), "gate.bias": torch.randn(N)}
    assert torch.equal(Patch.from_released(state).gate.noise_weight, noise.T)


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


def test_without_classes_the_gate_sees_t_alone(checkpoint):
    state = {name: tensor for name, tensor in checkpoint.items() if not name.startswith("y_embedder.")}
    assert Patch.from_released(state).backbone.condition_taps == ()


def test_released_patch_saves_and_loads_as_any_other(checkpoint, tmp_path, patched):
    patch = Patch.from_released(checkpoint)
    patch.save_pretrained(tmp_path)
    assert torch.equal(patched(patch), patched(Patch.from_pretrained(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, f"released code: no {name} in it") for name in NEEDED),
        (dict.fromkeys(NEEDED), "no prompt_embeddings, gate.weight, gate.bias in it"),
        ({"prompt_embeddings": torch.zeros(L * N, D)}, r"prompt_embeddings is \[48, 32\], expected \[L, N, D\]"),
        ({"prompt_embeddings": torch.zeros(L, 50, D)}, r"50 prompts a block are no square.*prepended"),
        ({"prompt_embeddings": torch.zeros(L, 25, D)}, r"gate.weight is \[16, 33\], expected \[25, 33\]"),
        ({"gate.weight": torch.zeros(N)}, r"gate.weight is \[16\], expected \[16, 33\]"),
        ({"gate.weight": torch.zeros(N, D)}, r"gate.weight is \[16, 32\], expected \[16, 33\]"),
        ({"gate.bias": torch.zeros(3)}, r"gate.bias is \[3\], expected \[16\]"),
        ({"w_noise": torch.zeros(N, D + 1)}, r"w_noise is \[16, 33\], expected \[32, 16\]"),
        ({"prompt_embeddings": 5}, "no prompt_embeddings in it"),
        ({"prompt_embeddings": torch.zeros(0, N, D)}, r"prompt_embeddings is \[0, 16, 32\], expected"),
        ({"prompt_embeddings": torch.zeros(L, 0, D)}, r"prompt_embeddings is \[3, 0, 32\], expected"),
        ({"gate.weight": torch.zeros(N, D + 1, dtype=torch.int8)}, "gate.weight is torch.int8"),
        ({17: torch.zeros(1)}, "17 is no name of a tensor"),
    ],
    ids=str,
)
def test_missing_key_or_wrong_shape_is_named(checkpoint, changes, message):
    state = {name: tensor for name, tensor in {**checkpoint, **changes}.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        Patch.from_released(state)


@pytest.mark.parametrize("top_k", [0.0, 192, -1.0])
def test_a_share_that_is_none(checkpoint, top_k):
    with pytest.raises(UserError, match=r"top_k=.* must be a share"):
        Patch.from_released(checkpoint, top_k)


def test_a_patch_whose_noise_saw_the_index_is_still_read(checkpoint, tmp_path):
    patch = Patch.from_released(checkpoint)
    patch.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    noise = tensors["gate.noise_weight"]
    tensors["gate.noise_weight"] = torch.cat([noise, torch.ones(N, 1)], dim=1)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(Patch.from_pretrained(tmp_path).gate.noise_weight, noise)


def test_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(UserError, match="No such checkpoint"):
        Patch.from_released(tmp_path / "nothing.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match=r"Cannot read '.*broken.pt'"):
        Patch.from_released(tmp_path / "broken.pt")
