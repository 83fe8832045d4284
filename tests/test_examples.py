"""Examples and documentation, run on tiny models."""

import re
import runpy
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from stagepatch import Patch
from stagepatch.families import registry
from tests.runs import draw_weights
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images

ROOT = Path(__file__).parent.parent


def run(name, directory, *arguments):
    """The example, with the model that lies in the directory."""
    script = str(ROOT / "examples" / name)
    paths = ["--model", directory / "model", "--output", directory / "out"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [script, *map(str, [*paths, *arguments])])
        runpy.run_path(script, run_name="__main__")


SHORT = ["--steps", 2, "--batch_size", 2]


def save(name, directory):
    pipe = PIPELINES[name].build()
    pipe.save_pretrained(directory)
    return pipe


def test_train_sd15(tmp_path):
    save("UNet2DConditionModel", tmp_path / "model")
    images = draw_images(tmp_path / "images")
    run("train_sd15.py", tmp_path, "--images", images, "--image_size", 32, *SHORT)
    assert (tmp_path / "out" / "base.png").exists()
    assert (tmp_path / "out" / "patched.png").exists()
    assert Patch.from_pretrained(tmp_path / "out").facts["steps"] == "2"


def test_sample_sdxl(tmp_path):
    pipe = save("UNet2DConditionModel of SDXL", tmp_path / "model")
    patch = Patch.create(pipe)
    draw_weights(patch.prompts, std=20.0)
    patch.save_pretrained(tmp_path / "patch")
    size = ["--height", 48, "--width", 32]
    run("sample_sdxl.py", tmp_path, "--patch", tmp_path / "patch", *size, "--steps", 2)
    base, patched = ((tmp_path / "out" / f"{name}.png").read_bytes() for name in ("base", "patched"))
    assert base != patched


def test_patch_flux(tmp_path):
    save("FluxTransformer2DModel", tmp_path / "model")
    images = draw_images(tmp_path / "images")
    draw_images(images, size=(32, 64))
    run("patch_flux.py", tmp_path, "--images", images, "--image_size", 64, "--bucket_step", 16, *SHORT)
    assert Patch.from_pretrained(tmp_path / "out").config.grid == [16, 16]


@pytest.mark.parametrize("sites", ["stages", "attention"])
def test_patch_ddpm(tmp_path, sites):
    save("UNet2DModel", tmp_path / "model")
    images = draw_images(tmp_path / "images", captions=False)
    run("patch_ddpm.py", tmp_path, "--images", images, "--sites", sites, "--image_size", 16, *SHORT)
    assert (tmp_path / "out" / "samples.png").exists()


def test_every_example_is_run_here():
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} <= tested


def test_adding_a_family_as_the_page_does(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-family.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 40
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    exec(code, {})
    assert "at 32 sites of 4096 tokens" in capsys.readouterr().out

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
    model = diffusers.LuminaNextDiT2DModel(**sizes, num_kv_heads=2, multiple_of=16, cross_attention_dim=24).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)  # the gates of its attention are zero at first
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([0.9, 0.1]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "encoder_mask": torch.ones(2, 5),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
    }
    base = model(**inputs).sample
    patch = Patch.create(model)
    with patch.attach(model):
        assert torch.equal(model(**inputs).sample, base)
        draw_weights(patch.prompts, std=20.0)
        output = model(**inputs).sample
        assert not torch.allclose(output, base, atol=1e-3)
        output.square().mean().backward()
    assert all(prompts.grad.abs().amax(dim=1).gt(0).all() for prompts in patch.prompts)
