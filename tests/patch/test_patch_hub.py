"""Patches on a Hub: `huggingface_hub` itself, against a local stand-in for the Hub's HTTP."""

import pytest
import torch
import yaml

from stagepatch.checkpoints import has_vae, load_captioner, load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.patch import Patch
from tests.tiny_pipelines import PIPELINES


def test_pushed_patch_comes_back_the_same(hub, tiny_dit, make_patch):
    patch = make_patch(tiny_dit(), preset="released")
    patch.facts = {"data": "digits", "steps": "2000"}
    url = patch.push_to_hub("somebody/patch", private=True, token="hf_none")
    assert url.startswith(hub.url + "/somebody/patch/commit/")
    assert hub.private == {"somebody/patch": True}
    assert sorted(hub.repos["somebody/patch"]) == ["README.md", "config.json", "model.safetensors"]
    loaded = Patch.from_pretrained("somebody/patch")
    assert (loaded.config, loaded.facts) == (patch.config, patch.facts)
    torch.testing.assert_close(loaded.state_dict(), patch.state_dict(), rtol=0, atol=0)


def test_saved_patch_is_pushed_under_the_directorys_name_or_another(hub, tiny_dit, make_patch, tmp_path):
    patch = make_patch(tiny_dit())
    patch.save_pretrained(tmp_path / "mine", push_to_hub=True, token="hf_none")
    patch.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="somebody/theirs", token="hf_none")
    assert sorted(hub.repos) == ["somebody/mine", "somebody/theirs"]
    assert (tmp_path / "mine" / "config.json").is_file()


def test_repository_that_is_not_there_is_named(hub):
    with pytest.raises(UserError, match=r"No patch at 'somebody/nothing': no such directory, and the Hub does not"):
        Patch.from_pretrained("somebody/nothing")


def test_model_of_the_hub_is_found_by_its_id(hub, tmp_path):
    pipe = PIPELINES["UNet2DConditionModel"].build()
    pipe.save_pretrained(tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    hub.repos["somebody/model"] = {str(path.relative_to(tmp_path / "model")): path.read_bytes() for path in files}
    model, scheduler = load_denoiser("somebody/model")
    assert type(model) is type(pipe.unet)
    torch.testing.assert_close(model.state_dict(), pipe.unet.state_dict(), rtol=0, atol=0)
    assert type(scheduler) is type(pipe.scheduler)
    assert has_vae("somebody/model")
    assert load_captioner("somebody/model")(["a cat"])["encoder_hidden_states"].shape[0] == 1
    with pytest.raises(UserError, match=r"No model at 'somebody/none': no such directory, and the Hub does not"):
        load_denoiser("somebody/none")


def test_refused_push_is_told(hub, tiny_dit, make_patch):
    with pytest.raises(UserError, match="Cannot push to 'forbidden/patch'"):
        make_patch(tiny_dit()).push_to_hub("forbidden/patch", token="hf_none")


@pytest.mark.parametrize("source", ["nowhere", "./some/where", "a/b/c", "/tmp/nowhere"])
def test_paths_are_not_asked_of_the_hub(source):
    with pytest.raises(UserError, match=f"No patch at '{source}': no such directory"):
        Patch.from_pretrained(source)


def test_card_says_what_the_patch_is_and_how_to_load_it(model, make_patch, tmp_path):
    model.register_to_config(_name_or_path="somebody/model")
    patch = make_patch(model)
    patch.facts = {"data": "10 images", "steps": "20", "loss": "0.5"}
    patch.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("somebody/model", "stagepatch")
    for fact in ("| data | 10 images |", "| steps | 20 |", "| loss | 0.5 |", "3: blocks.0 … blocks.2"):
        assert fact in card
    assert 'DiffusionPipeline.from_pretrained("somebody/model")' in card
    assert f"{patch.num_parameters():,}" in card
