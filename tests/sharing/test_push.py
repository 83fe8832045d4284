"""What goes on the Hub: `huggingface_hub` itself against a local stand-in, and cards read by its own parser."""

import json
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, snapshot_download
from PIL import Image
from safetensors.torch import save_file

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.patch import Patch, PatchConfig
from stagepatch.sampling import load_experts, load_limited_loras
from stagepatch.sharing import push_folder, write_folder
from tests.runs import draw_weights
from tests.tiny_pipelines import PIPELINES

SECRET = "hf_of_nobody_else"
TINY = PIPELINES["SD3Transformer2DModel"]
FACTS = {"base model": "somebody/model", "data": "photos", "steps": "20", "noise levels": "0.5 to 1"}


def save_lora(directory, facts=None, seed=1, **choices):
    pipe = TINY.build()
    method = LoRA(LoRAConfig(**{"rank": 2, **choices}), facts)
    draw_weights(method.prepare(pipe.transformer)[0]["params"], seed=seed)
    method.save(directory)
    return pipe


def save_patch(directory):
    model, _ = load_denoiser("digits")
    patch = Patch.create(model, PatchConfig(sites="first"))
    draw_weights(patch.prompts)
    patch.save_pretrained(directory)
    return patch


@pytest.fixture
def run(tmp_path):
    """A LoRA's run with everything beside it, and samples and figures of their commands."""
    run = tmp_path / "run"
    save_lora(run, FACTS)
    (run / "run.yaml").write_text("model: somebody/model\n")
    (run / "report.html").write_text("<html></html>")
    (run / "validation").mkdir()
    for step in (10, 20):
        Image.new("RGB", (8, 8)).save(run / "validation" / f"{step:07d}.png")
    (tmp_path / "sample").mkdir()
    save_file({"images": torch.rand(3, 3, 8, 8)}, tmp_path / "sample" / "samples.safetensors")
    (tmp_path / "sample" / "run.yaml").write_text(yaml.safe_dump({"prompts": ["a house", "a cat: red"]}))
    (tmp_path / "evaluate").mkdir()
    figures = {"seeds": [0, 1], "base": [{"fid_train": 2.0}, {"fid_train": 4.0}], "patched": [{"fid_train": 1.0}] * 2}
    (tmp_path / "evaluate" / "metrics.json").write_text(json.dumps(figures))
    (tmp_path / "evaluate" / "run.yaml").write_text("data: {source: photos}\nextractor: inception\n")
    return run


def test_a_loras_card_as_huggingface_hub_reads_it(run, tmp_path, capsys):
    folder = tmp_path / "folder"
    given = [f"--samples={tmp_path / 'sample'}", f"--evaluation={tmp_path / 'evaluate'}", "--prompt=in brush style"]
    assert main(["push", str(run), "somebody/style", *given, f"--dry_run={folder}"]) == 0
    assert "would be uploaded to 'somebody/style'" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "somebody/model"
    assert {"lora", "template:diffusion-lora", "base_model:adapter:somebody/model"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.instance_prompt == "in brush style"
    assert [entry["text"] for entry in card.data.widget] == ["a house", "a cat: red", "a house"]
    for entry in card.data.widget:
        assert Image.open(folder / entry["output"]["url"]).size == (32, 32)
    (result,) = card.data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid_train", 1.0, "photos")
    assert card.data.model_name == "somebody/style"
    for text in (
        "| 3 | 1 |",
        "| ranks | 2 |",
        "| steps | 20 |",
        "after 20 steps",
        "Use `in brush style`",
        "<Gallery />",
    ):
        assert text in card.text, text
    assert 'LimitedLoRA("lora", 500, 1000)' in card.text
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {"README.md", "lora.json", "pytorch_lora_weights.safetensors", "run.yaml", "report.html"}
    assert files == expected | {"validation.png", "samples/0.png", "samples/1.png", "samples/2.png"}


def test_of_videos_the_first_frames_are_shown(run, tmp_path):
    frames = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 32, 32) / 3 - 1
    save_file({"images": frames.contiguous()}, tmp_path / "sample" / "samples.safetensors")
    config = {"prompts": ["a house", "a cat"], "sampling": {"num_images": 2}}
    (tmp_path / "sample" / "run.yaml").write_text(yaml.safe_dump(config))
    write_folder(run, tmp_path / "folder", "somebody/style", samples=str(tmp_path / "sample"))
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert [entry["text"] for entry in card.data.widget] == ["a house", "a cat"]
    shown = [Image.open(tmp_path / "folder" / entry["output"]["url"]).getpixel((0, 0)) for entry in card.data.widget]
    assert shown == [(0, 0, 0), (128, 128, 128)]


def test_a_t_loras_card_says_that_others_would_run_it_unweighed(tmp_path):
    save_lora(tmp_path / "t", FACTS, rank=4, min_rank=1)
    write_folder(tmp_path / "t", tmp_path / "folder", "somebody/t")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    assert card.data.library_name == "stagepatch"
    for text in ("4, of which 1 at pure noise", "diffusers refuses the file; ComfyUI would run it", "open_artifact("):
        assert text in card.text


def test_what_is_pushed_comes_back_and_no_token_is_told(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert main(["push", str(run), "somebody/style", "--private"]) == 0
    patch = save_patch(tmp_path / "patch")
    assert main(["push", str(tmp_path / "patch"), "somebody/patch"]) == 0
    assert main(["push", str(run), "forbidden/style"]) == 2
    told = capsys.readouterr()
    assert f"{hub.url}/somebody/style/commit/" in told.out
    assert "Cannot push to 'forbidden/style'" in told.err
    assert SECRET not in told.out + told.err
    assert not any(SECRET.encode() in content for files in hub.repos.values() for content in files.values())
    assert hub.private["somebody/style"]
    assert not hub.private["somebody/patch"]
    assert torch.equal(Patch.from_pretrained("somebody/patch").prompts[0], patch.prompts[0])
    pipe = TINY.build()
    pipe.load_lora_weights(snapshot_download("somebody/style"))
    torch.testing.assert_close(TINY.call(pipe), TINY.call(save_lora(tmp_path / "again")), rtol=1e-4, atol=1e-4)


def test_a_branch_is_made_and_the_calls_are_the_apis_own(run, tmp_path, monkeypatch):
    api = mock.create_autospec(HfApi, instance=True)
    api.upload_folder.return_value = "the commit"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    assert push_folder(tmp_path, "somebody/style", revision="next") == "the commit"
    api.create_repo.assert_called_once_with("somebody/style", private=None, exist_ok=True)
    api.create_branch.assert_called_once_with("somebody/style", branch="next", exist_ok=True)
    (call,) = api.upload_folder.call_args_list
    assert {"repo_id": "somebody/style", "folder_path": tmp_path, "revision": "next"}.items() <= call.kwargs.items()


def test_a_file_of_loras_goes_with_what_it_names(tmp_path):
    for number, name in enumerate(("one", "two")):
        save_lora(tmp_path / name, seed=number)
    file = (tmp_path / "two" / "pytorch_lora_weights.safetensors").rename(tmp_path / "detail.safetensors")
    entries = [{"file": "one", "from": 500, "to": 1000}, {"file": str(file), "from": 0, "to": 600, "weight": 0.5}]
    schedule = tmp_path / "experts.yaml"
    schedule.write_text(yaml.safe_dump({"loras": [*entries, {"file": "name/lora", "from": 0, "to": 9}]}))
    write_folder(schedule, tmp_path / "pushed", "somebody/experts")
    card = ModelCard.load(tmp_path / "pushed" / "README.md")
    assert "| 2-detail.safetensors | timesteps 0 to 600 |" in card.text
    assert 'load_limited_loras(snapshot_download("its Hub id") + "/experts.yaml", pipe)' in card.text
    written = yaml.safe_load((tmp_path / "pushed" / "experts.yaml").read_text())["loras"]
    assert [entry["file"] for entry in written] == ["1-one", "2-detail.safetensors", "name/lora"]

    def images(schedule, loras):
        schedule.write_text(yaml.safe_dump({"loras": loras[:2]}))
        pipe = TINY.build()
        load_limited_loras(schedule, pipe)
        return TINY.call(pipe, steps=3)

    expected = images(schedule, entries)
    for moved in ("one", "detail.safetensors"):
        (tmp_path / moved).rename(tmp_path / f"{moved}.gone")
    assert torch.equal(images(tmp_path / "pushed" / "experts.yaml", written), expected)


def test_experts_and_several_denoisers_go_with_what_they_name(tmp_path):
    save_patch(tmp_path / "stages" / "0")
    experts = [{"from": 0, "to": 500, "learned": "stages/0"}, {"from": 500, "to": 1000}]
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    write_folder(tmp_path / "experts.yaml", tmp_path / "pushed", "somebody/experts")
    model, scheduler = load_denoiser("digits")
    loaded = load_experts(tmp_path / "pushed" / "experts.yaml", model, scheduler)
    assert [(each.start, each.denoiser is None) for each in loaded.ranges] == [(0, False), (500, True)]
    assert "| 1-0 | timesteps 0 to 500 |" in (tmp_path / "pushed" / "README.md").read_text()
    for name in ("transformer", "transformer_2"):
        save_lora(tmp_path / "both" / "denoisers" / name)
    ranges = {"transformer_2": {"range": [0, 0.9]}, "transformer": {"range": [0.9, 1]}}
    (tmp_path / "both" / "denoisers.json").write_text(json.dumps(ranges))
    write_folder(tmp_path / "both", tmp_path / "denoisers", "somebody/both")
    card = ModelCard.load(tmp_path / "denoisers" / "README.md")
    assert "| transformer | a LoRA, for noise levels 0.9 to 1 |" in card.text
    assert (tmp_path / "denoisers" / "denoisers" / "transformer_2" / "pytorch_lora_weights.safetensors").exists()


def test_what_is_not_shared_is_said(run, tmp_path, capsys):
    assert main(["push", str(run)]) == 2
    assert "stagepatch push PATH NAME/REPOSITORY" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"'digits' is not shared: it is a model\. Shared are: patch, LoRA"):
        write_folder("digits", tmp_path / "new", "a/b")
    with pytest.raises(UserError, match="is not empty: give a folder that is new"):
        write_folder(run, run, "a/b")
    (run / "metrics.json").write_text('{"seeds": [0], "base": [{}]}')
    with pytest.raises(UserError, match="compares nothing with the base"):
        write_folder(run, tmp_path / "other", "a/b")
    (tmp_path / "local").mkdir()
    (tmp_path / "e.yaml").write_text("experts: [{from: 0, to: 9, model: local}, {from: 9, to: 1000}]")
    with pytest.raises(UserError, match=r"names a model on this disk, 'local': push that"):
        write_folder(tmp_path / "e.yaml", tmp_path / "third", "a/b")
    assert Path(run / "lora.json").exists()
