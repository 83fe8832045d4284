"""The demo end to end, with a plan of a few steps."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from stagepatch import Patch
from stagepatch.checkpoints import load_denoiser
from stagepatch.checkpoints.layout import BUNDLED
from stagepatch.cli import demo, main
from stagepatch.evaluation import Measured
from stagepatch.sampling import SamplingConfig
from tests.runs import config_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    training = config_of(batch_size=16, learning_rate=0.05, log_every=2, checkpoint_every=3)
    sampling = SamplingConfig(num_inference_steps=3, num_images=60, batch_size=60)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "demo_plan", lambda quick: (training, sampling))
        assert main(["demo", "--quick", f"--output_dir={directory}"]) == 0
    return directory


def test_demo_writes_patch_samples_and_report(run):
    model, _ = load_denoiser("digits")
    patch = Patch.from_pretrained(run)
    assert any(bool(prompt.any()) for prompt in patch.prompts)
    patch.attach(model)
    samples = load_file(run / "samples.safetensors")
    assert samples["base"].shape == samples["patched"].shape == (60, 1, 8, 8)
    assert not torch.equal(samples["base"], samples["patched"])
    assert (samples["base"] - samples["patched"]).abs().mean() < 0.5, "the same noise gives related images"


def test_report_shows_the_measured_numbers(run):
    page = (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["base"]) == len(demo.SEEDS) == 3
    mean = sum(value["fid_held_out"] for value in metrics["base"]) / 3
    for text in (f"{mean:.4f} ±", "quick: too short to judge by", "stagepatch demo --quick"):
        assert text in page
    assert page.count("data:image/png") == 3
    titles = re.findall(r"<h2>([^<]+)", page)
    assert {"Samples", "Training", "Gate activation", "Config", "Environment", "Again"} <= set(titles)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([-1.0, -1.1, -0.9], "gains"), ([1.0, 1.1, 0.9], "does not gain"), ([-1.0, 1.0, 0.1], "No gain to be told")],
)
def test_verdict_follows_the_numbers(changes, expected):
    base = Measured([{"fid_held_out": 10.0}] * 3, torch.empty(0))
    patched = Measured([{"fid_held_out": 10.0 + change} for change in changes], torch.empty(0))
    assert expected in demo.verdict(base, patched, quick=False)
    assert "quick" in demo.verdict(base, patched, quick=True)
    assert "quick" not in demo.verdict(base, patched, quick=False)


def test_the_bundled_model_is_small_and_made_by_the_config_in_the_repository():
    weights = BUNDLED["digits"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 3_000_000
