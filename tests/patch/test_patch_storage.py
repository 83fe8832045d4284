import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stagepatch.core.errors import UserError
from stagepatch.patch import Patch, PatchConfig

N, D = 16, 32


def shapes(directory):
    return {name: tuple(tensor.shape) for name, tensor in load_file(directory / "model.safetensors").items()}


def prompts(*shape):
    return {f"prompts.blocks.{index}": shape for index in range(3)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, {**prompts(N, D), "gate.weight": (N, D + 1), "gate.bias": (N,)}),
        ({"num_experts": 2}, {**prompts(2, N, D), "gate.weight": (2, D + 1), "gate.bias": (2,)}),
        ({"block_index": False}, {**prompts(N, D), "gate.weight": (N, D), "gate.bias": (N,)}),
        ({"gate": "none"}, prompts(N, D)),
        ({"gate": "attention"}, {**prompts(N, D), "gate.query_weight": (D, D + 1), "gate.keys": (N, D)}),
        (
            {"preset": "released"},
            {**prompts(N, D), "gate.weight": (N, D + 1), "gate.bias": (N,), "gate.noise_weight": (N, D + 1)},
        ),
        (
            {"position": "prepend", "prepending": "plain", "num_prompts": 5, "sites": ["blocks.1"]},
            {"prompts.blocks.1": (5, D), "gate.weight": (5, D + 1), "gate.bias": (5,)},
        ),
        (
            {"position": "prepend", "num_prompts": 5, "sites": ["blocks.1"], "gate": "none"},
            {"prompts.blocks.1": (5, D), "head_gates.blocks.1": (2,)},
        ),
        ({"grid": [2, 3]}, {**prompts(6, D), "gate.weight": (6, D + 1), "gate.bias": (6,)}),
    ],
    ids=str,
)
def test_file_holds_exactly_these_tensors(tiny_dit, make_patch, tmp_path, choices, expected):
    patch = make_patch(tiny_dit(), **choices)
    patch.save_pretrained(tmp_path)
    assert shapes(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_file_says_what_and_for_which_model(tiny_dit, make_patch, tmp_path):
    make_patch(tiny_dit(), sites="half").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == {"stagepatch_version", "patch", "backbone", "fingerprint", "facts"}
    assert config["patch"]["sites"] == "half"
    assert config["backbone"]["model_class"] == "DiT"
    assert config["backbone"]["condition_channels"] == D
    assert [site["name"] for site in config["backbone"]["sites"]] == ["blocks.0", "blocks.1"]
    assert config["backbone"]["sites"][0]["grid"] == [4, 4]


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"preset": "released"},
        {"sites": "half"},
        {"num_experts": 3, "gate": "attention"},
        {"gate": "none"},
        {"position": "prepend", "num_prompts": 4},
        {"selection": "hard", "top_k": 5},
    ],
    ids=str,
)
def test_saved_and_loaded_patch_gives_the_same_output_bit_for_bit(model, make_patch, tmp_path, choices, patched):
    patch = make_patch(model, **choices)
    expected = patched(patch)
    patch.train().save_pretrained(tmp_path / "new" / "directory")
    loaded = Patch.from_pretrained(str(tmp_path / "new" / "directory"))
    assert not loaded.training
    assert torch.equal(patched(loaded), expected)


def test_saving_again_replaces_the_former_patch(tiny_dit, make_patch, tmp_path):
    make_patch(tiny_dit(), seed=1).save_pretrained(tmp_path)
    second = make_patch(tiny_dit(), seed=2, sites="first")
    second.save_pretrained(tmp_path)
    assert torch.equal(Patch.from_pretrained(tmp_path).prompts[0], second.prompts[0])


def test_save_that_fails_leaves_the_former_patch(tiny_dit, make_patch, tmp_path, monkeypatch):
    first = make_patch(tiny_dit(), seed=1)
    first.save_pretrained(tmp_path)
    monkeypatch.setattr("stagepatch.patch.storage.write_tensors", Mock(side_effect=OSError("No space left")))
    with pytest.raises(OSError, match="No space"):
        make_patch(tiny_dit(), seed=2).save_pretrained(tmp_path)
    assert torch.equal(Patch.from_pretrained(tmp_path).prompts[0], first.prompts[0])


# Broken files


@pytest.fixture
def saved(tiny_dit, make_patch, tmp_path):
    make_patch(tiny_dit()).save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"No patch at '.*nowhere'"):
        Patch.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_is_not_there(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"No such file: '.*{name}'"):
        Patch.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors' is not a whole safetensors file"):
        Patch.from_pretrained(saved)


def test_file_of_another_format(saved):
    torch.save({"a": torch.ones(1)}, saved / "model.safetensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Patch.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.clear() or tensors.update(other=torch.ones(3)),
            "does not hold this patch: gate.bias",
        ),
        (lambda tensors: tensors.pop("prompts.blocks.1"), "prompts.blocks.1 missing or not expected"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "extra missing or not expected"),
        (
            lambda tensors: tensors.update({"gate.bias": torch.ones(9)}),
            r"gate.bias is \(9,\), expected \(16,\)",
        ),
    ],
    ids=["foreign", "missing", "extra", "shape"],
)
def test_safetensors_of_something_else(saved, change, message):
    edit_tensors(saved, change)
    with pytest.raises(UserError, match=message):
        Patch.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["patch"].update(depth=3), r"Unknown key in a patch's config: depth\. Known: "),
        (lambda config: config["patch"].update(selection="fuzzy"), "selection='fuzzy' is none of soft, hard"),
        (lambda config: config["patch"].update(num_prompts="5"), "num_prompts='5'"),
        (lambda config: config.pop("backbone"), "not a patch's config: no 'patch' and 'backbone'"),
        (lambda config: config.update(patch=[1]), "not a patch's config"),
        (lambda config: config["backbone"].pop("sites"), "in a form not known here: 'sites'"),
        (lambda config: config["backbone"].update(sites=[]), "in a form not known here"),
        (lambda config: config["backbone"].update(colour="red"), "in a form not known here.*colour"),
        (lambda config: config["backbone"]["sites"][0].pop("channels"), "in a form not known here.*channels"),
    ],
)
def test_config_that_does_not_describe_a_patch(saved, change, message):
    edit_config(saved, change)
    with pytest.raises(UserError, match=message):
        Patch.from_pretrained(saved)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\x00\x01"])
def test_config_that_is_no_json_object(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json'"):
        Patch.from_pretrained(saved)


# Other models


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": 4}, r"3 sites \(blocks.0…\) against 4"),
        ({"num_layers": 2}, r"3 sites \(blocks.0…\) against 2"),
        (
            {"hidden_size": 48},
            "condition_channels 32 against the model's 48; channels 32 at blocks.0 against the model's 48",
        ),
    ],
    ids=str,
)
def test_model_that_the_patch_was_not_made_for_is_refused_by_what_differs(
    tiny_dit, batch, make_patch, tmp_path, overrides, message
):
    make_patch(tiny_dit()).save_pretrained(tmp_path)
    other = tiny_dit(**overrides)
    patch = Patch.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"The patch is for another model: {message}"):
        patch.attach(SimpleNamespace(transformer=other))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_patch_of_named_sites_that_the_model_lacks_is_refused(tiny_dit, make_patch):
    patch = make_patch(tiny_dit(), sites=["blocks.2"])
    with pytest.raises(UserError, match=r"No site is named blocks\.2"):
        patch.attach(tiny_dit(num_layers=2))


def test_refusal_tells_the_class_and_the_condition_apart(tiny_dit, make_patch):
    from dataclasses import replace

    patch = make_patch(tiny_dit())
    patch.backbone = replace(patch.backbone, model_class="UViT", condition_channels=7)
    with pytest.raises(UserError, match="model_class UViT against the model's DiT; condition_channels 7 against"):
        patch.attach(tiny_dit())


def test_patch_of_the_first_block_is_refused_by_a_deeper_model(tiny_dit, make_patch):
    with pytest.raises(UserError, match="num_layers 3 against the model's 5"):
        make_patch(tiny_dit(), sites="first").attach(tiny_dit(num_layers=5))


def test_default_config_is_the_papers(tiny_dit):
    assert Patch.create(tiny_dit()).config == PatchConfig()
