import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stagepatch.core.errors import UserError
from stagepatch.patch import Patch
from tests.patch.conftest import VARIANTS

N, D = 16, 32


def prompts(*shape):
    return {f"prompts.blocks.{index}": shape for index in range(3)}


def gate(choices, channels=D + 1):
    return {"gate.weight": (choices, channels), "gate.bias": (choices,)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({}, {**prompts(N, D), **gate(N)}),
        ({"num_experts": 2}, {**prompts(2, N, D), **gate(2)}),
        ({"block_index": False}, {**prompts(N, D), **gate(N, D)}),
        ({"gate": "none"}, prompts(N, D)),
        ({"gate": "attention"}, {**prompts(N, D), **{f"gate.{name}": (D, D) for name in ("query", "key", "value")}}),
        ({"gate": "learned_keys"}, {**prompts(N, D), "gate.query_weight": (D, D + 1), "gate.keys": (N, D)}),
        ({"preset": "released"}, {**prompts(N, D), **gate(N), "gate.noise_weight": (N, D)}),
        (
            {"position": "prepend", "prepending": "plain", "num_prompts": 5, "sites": ["blocks.1"]},
            {"prompts.blocks.1": (5, D), **gate(5)},
        ),
        (
            {"position": "prepend", "num_prompts": 5, "sites": ["blocks.1"], "gate": "none"},
            {"prompts.blocks.1": (5, D), "head_gates.blocks.1": (2,)},
        ),
        ({"grid": [2, 3]}, {**prompts(6, D), **gate(6)}),
    ],
    ids=str,
)
def test_file_holds_exactly_these_tensors(tiny_dit, make_patch, tmp_path, choices, expected):
    patch = make_patch(tiny_dit(), **choices)
    patch.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_file_says_what_and_for_which_model(tiny_dit, make_patch, tmp_path):
    make_patch(tiny_dit(), sites="half").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert set(values) == {"stagepatch_version", "patch", "backbone", "fingerprint", "facts"}
    assert values["patch"]["sites"] == "half"
    backbone = values["backbone"]
    assert (backbone["model_class"], backbone["condition_channels"]) == ("DiT", D)
    assert [(site["name"], site["grid"]) for site in backbone["sites"]] == [("blocks.0", [4, 4]), ("blocks.1", [4, 4])]


@pytest.mark.parametrize(
    "choices", [*VARIANTS, {"sites": "half"}, {"num_experts": 3, "gate": "learned_keys"}], ids=str
)
def test_saved_and_loaded_patch_gives_the_same_output_bit_for_bit(model, make_patch, tmp_path, choices, patched):
    patch = make_patch(model, **choices)
    expected = patched(patch)
    patch.train().save_pretrained(tmp_path / "new" / "directory")
    loaded = Patch.from_pretrained(str(tmp_path / "new" / "directory"))
    assert not loaded.training
    assert torch.equal(patched(loaded), expected)


def test_a_patch_of_0_1_0_whose_gate_was_called_attention_still_opens(model, make_patch, tmp_path, patched):
    patch = make_patch(model, gate="learned_keys")
    expected = patched(patch)
    patch.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("learned_keys", "attention"))
    loaded = Patch.from_pretrained(tmp_path)
    assert loaded.config.gate == "learned_keys"
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


def config(change):
    """Damages config.json by a change of what it holds."""

    def damage(directory):
        path = directory / "config.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def tensors(change):
    """Damages model.safetensors by a change of the tensors in it."""

    def damage(directory):
        values = load_file(directory / "model.safetensors")
        change(values)
        save_file(values, directory / "model.safetensors")

    return damage


def cut(kept):
    def damage(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])

    return damage


def text(content):
    return lambda directory: (directory / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "config.json").unlink(), "No such file: '.*config.json'"),
        (lambda directory: (directory / "model.safetensors").unlink(), "No such file: '.*model.safetensors'"),
        *((cut(kept), r"model\.safetensors' is not a whole safetensors file") for kept in (0, 4, 100, -1)),
        (
            lambda directory: torch.save({"a": torch.ones(1)}, directory / "model.safetensors"),
            "not a whole safetensors",
        ),
        (tensors(lambda t: t.clear() or t.update(other=torch.ones(3))), "does not hold this patch: gate.bias"),
        (tensors(lambda t: t.pop("prompts.blocks.1")), "prompts.blocks.1 missing or not expected"),
        (tensors(lambda t: t.update(extra=torch.ones(3))), "extra missing or not expected"),
        (tensors(lambda t: t.update({"gate.bias": torch.ones(9)})), r"gate.bias is \(9,\), expected \(16,\)"),
        (config(lambda c: c["patch"].update(depth=3)), r"Unknown key in a patch's config: depth\. Known: "),
        (config(lambda c: c["patch"].update(selection="fuzzy")), "selection='fuzzy' is none of soft, hard"),
        (config(lambda c: c["patch"].update(num_prompts="5")), "num_prompts='5'"),
        (config(lambda c: c.pop("backbone")), "not a patch's config: no 'patch' and 'backbone'"),
        (config(lambda c: c.update(patch=[1])), "not a patch's config"),
        (config(lambda c: c["backbone"].pop("sites")), "in a form not known here: 'sites'"),
        (config(lambda c: c["backbone"].update(sites=[])), "in a form not known here"),
        (config(lambda c: c["backbone"].update(colour="red")), "in a form not known here.*colour"),
        (config(lambda c: c["backbone"]["sites"][0].pop("channels")), "in a form not known here.*channels"),
        # More than there is memory for: refused before any is taken.
        (config(lambda c: c["backbone"]["sites"][0].update(channels=10**12)), r"expected \(16, 1000000000000\)"),
        (config(lambda c: c["fingerprint"].update(colour="red")), "fingerprint in a form not known here"),
        *((text(content), r"config\.json'") for content in ("{", "[1, 2]", "\x00\x01")),
    ],
)
def test_broken_patch_is_refused_by_what_is_wrong(tiny_dit, make_patch, tmp_path, damage, message):
    make_patch(tiny_dit()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        Patch.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sites", "layers", "message"),
    [(["blocks.2"], 2, r"No site is named blocks\.2"), ("first", 5, "num_layers 3 against the model's 5")],
)
def test_model_of_another_depth_is_refused_whatever_the_sites(tiny_dit, make_patch, sites, layers, message):
    with pytest.raises(UserError, match=message):
        make_patch(tiny_dit(), sites=sites).attach(tiny_dit(num_layers=layers))


def test_refusal_tells_the_class_and_the_condition_apart(tiny_dit, make_patch):
    patch = make_patch(tiny_dit())
    patch.backbone = replace(patch.backbone, model_class="UViT", condition_channels=7)
    with pytest.raises(UserError, match="model_class UViT against the model's DiT; condition_channels 7 against"):
        patch.attach(tiny_dit())
