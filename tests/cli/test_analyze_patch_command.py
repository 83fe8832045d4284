"""`stagepatch analyze --patch` from end to end: the gate's numbers, and samples without and with the patch."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from stagepatch.analysis import gate_activation
from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.patch import Patch, PatchConfig
from stagepatch.sampling import SamplingConfig, generate
from tests.runs import draw_weights
from tests.search.searches import save_learned
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images

PICTURES = ("gate_activation", "temporal_bias", "spatial_bias", "structural_bias", "effect", "gate_training")


def analyze(output, *more):
    return main(["analyze", "--gradients=false", "--losses=false", f"--output_dir={output}", *more])


def analysed(output, *more):
    assert analyze(output, *more) == 0
    return json.loads((output / "analysis.json").read_text())


def save_patch(model, directory, **choices):
    patch = Patch.create(model, PatchConfig(**choices))
    draw_weights(patch.parameters())
    patch.save_pretrained(directory)
    return patch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A patch, a LoRA, prompts without a gate, and a model of captions."""
    root = tmp_path_factory.mktemp("made")
    save_patch(load_denoiser("digits")[0], root / "patch", sites="first")
    save_learned("lora", load_denoiser("digits")[0], root / "lora")
    Patch.create(load_denoiser("digits")[0], PatchConfig(gate="none")).save_pretrained(root / "tuned")
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(root / "text")
    return root


@pytest.fixture
def patched_digits(tmp_path):
    save_patch(load_denoiser("digits")[0], tmp_path / "patch", condition="t+c")
    return tmp_path / "patch"


def test_everything_of_a_patch_on_digits(patched_digits, tmp_path, capsys):
    options = [
        "--gate_conditions=10",
        "--structure_samples=6",
        "--sampling.num_inference_steps=3",
        "--sampling.seed=4",
        *("--effect=true", "--timesteps=4", "--samples=6"),
        f"--snapshots={tmp_path / 'run'}",
    ]
    for iteration in ("0000002", "0000004"):
        shutil.copytree(patched_digits, tmp_path / "run" / "snapshots" / iteration)
    numbers = analysed(tmp_path / "out", f"--patch={patched_digits}", *options)
    text = capsys.readouterr().out
    for expected in (
        "Change over timesteps",
        "Gate over timesteps",
        "normalization 'softmax'",
        "Likeness between samples",
        "Report:",
    ):
        assert expected in text
    assert set(numbers) == set(PICTURES)
    for name in PICTURES:
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] > 300
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == len(PICTURES) + 2, "and the two grids under a slider"
    assert page.count('type="range"') == 1

    model, scheduler = load_denoiser("digits")
    patch = Patch.from_pretrained(patched_digits)
    sampling = SamplingConfig(num_inference_steps=3, num_images=6, seed=4)
    images = {"base": generate(model, scheduler, sampling)}
    with patch.attach(model):
        images["patched"] = generate(model, scheduler, sampling)
        weights = [gate_activation(model, patch, torch.arange(1000), label) for label in range(10)]
    written = load_file(tmp_path / "out" / "gate_activation.safetensors")
    torch.testing.assert_close(written["activation"], torch.stack(weights).mean(dim=0))
    assert torch.equal(written["timesteps"], torch.arange(1000))
    maps = written["activation"].mean(dim=1).view(4, 4, 4)
    np.testing.assert_allclose(numbers["spatial_bias"]["mean_activation"], maps, rtol=1e-5)
    for name, of in images.items():
        pairs = np.corrcoef(of.flatten(1).double().numpy())[~np.eye(6, dtype=bool)]
        found = numbers["structural_bias"][name]["correlation"]
        assert [found[key] for key in ("max", "min", "mean", "std")] == pytest.approx(
            [pairs.max(), pairs.min(), pairs.mean(), pairs.std()], abs=1e-5
        )
    assert numbers["structural_bias"]["base"] != numbers["structural_bias"]["patched"]
    assert np.shape(numbers["effect"]["blocks"]) == (4, 4)
    assert all(change > 0 for change in numbers["effect"]["prediction"])
    of_one = np.mean(numbers["temporal_bias"]["effective_prompts"], axis=1)
    over_training = numbers["gate_training"]["effective_prompts"]
    np.testing.assert_allclose(over_training, np.stack([of_one, of_one], 1), rtol=1e-6)


def test_only_what_was_asked_is_computed(made, tmp_path):
    quick = ["--structure_samples=2", "--sampling.num_inference_steps=1"]
    numbers = analysed(tmp_path / "gate", f"--patch={made / 'patch'}", "--gate_timesteps=4")
    assert set(numbers) == set(PICTURES[:3])
    assert numbers["gate_activation"]["timesteps"] == [125, 375, 625, 875]
    assert set(analysed(tmp_path / "base", *quick)["structural_bias"]) == {"samples", "of", "base"}
    of_lora = ["--gate=false", "--effect=true", "--timesteps=2", "--samples=2"]
    numbers = analysed(tmp_path / "lora", f"--patch={made / 'lora'}", *of_lora, *quick)
    assert set(numbers) == {"effect", "structural_bias"}
    assert set(numbers["structural_bias"]) == {"samples", "of", "base", "patched"}


def test_a_latent_model_of_captions_is_not_decoded(tmp_path, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    pipe = PIPELINES["UNet2DConditionModel"].build()
    pipe.save_pretrained(tmp_path / "model")
    save_patch(pipe.unet, tmp_path / "patch", condition="t+text", sites="first")
    options = [f"--model={tmp_path / 'model'}", f"--patch={tmp_path / 'patch'}", "--gate_timesteps=3"]
    options += ["--structure_samples=3", "--sampling.num_inference_steps=1"]
    given = analysed(tmp_path / "given", "--prompts=['a cat', 'a red house']", *options)
    assert given["structural_bias"]["of"] == "latents"
    assert given["gate_activation"]["conditions"] == 2
    assert given["spatial_bias"]["grid"] == [8, 8]
    draw_images(tmp_path / "images", size=(32, 32))
    source = [f"--data.source={tmp_path / 'images'}", "--data.image_size=32"]
    of_data = analysed(tmp_path / "data", *source, "--gate_conditions=3", *options)
    assert of_data["gate_activation"]["conditions"] == 3
    assert of_data["structural_bias"] != given["structural_bias"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--patch=nowhere"], "No patch at 'nowhere'"),
        (["--patch=MADE/patch", "--gate=false"], "set gate or effect to true"),
        (["--effect=true"], "give it as `patch`"),
        (["--effect=true", "--patch=MADE/text", "--gate=false"], "holds nothing that a method learned"),
        (["--patch=MADE/patch", "--snapshots=MADE/patch"], "has no snapshots"),
        (["--patch=MADE/patch", "--gate_timesteps=1"], "gate_timesteps=1 must be from 2 to 1000"),
        (["--patch=MADE/patch", "--gate_conditions=0"], "gate_conditions=0 must be at least 1"),
        (["--structure_samples=1"], "structure_samples=1 must be at least 2, or 0 for none"),
        (["--patch=MADE/lora"], "does not hold a patch, but a LoRA"),
        (["--patch=MADE/tuned"], "no weights over its prompts"),
        (["--patch=MADE/patch", "--model=MADE/text"], "takes captions: give --prompts"),
    ],
)
def test_mistakes_are_named(made, tmp_path, capsys, given, message):
    assert analyze(tmp_path / "out", *(text.replace("MADE", str(made)) for text in given)) == 2
    error = capsys.readouterr().err
    assert error.startswith("stagepatch analyze: ")
    assert message in error
