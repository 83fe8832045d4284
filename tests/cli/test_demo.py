"""The demo end to end, with plans of a few steps."""

import json
import re
from dataclasses import replace

import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

from stagepatch import Patch, open_artifact
from stagepatch.checkpoints import load_denoiser
from stagepatch.checkpoints.layout import BUNDLED
from stagepatch.cli import demo, main
from stagepatch.data import DataConfig
from stagepatch.evaluation import Evaluator, Measured
from stagepatch.sampling import SamplingConfig, attach_guide
from tests.runs import config_of

SIZES = {"digits": 8, "fashion": 16}
TRAINED = {"digits": 4 * 16 * 64 + 16 * 65 + 16, "fashion": 4 * 8 * 64 * (1 + 3 + 1 + 1)}  # qkv in, out; proj


@pytest.fixture(scope="module", params=["digits", "fashion"])
def run(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    plan = demo.demo_plan(request.param, True)
    plan.train.training = config_of(batch_size=16, learning_rate=0.05, log_every=2, checkpoint_every=3)
    plan.train.ddo.sampling = SamplingConfig(num_inference_steps=2, num_images=20, batch_size=20)
    plan.train.ddo.max_denoising_change = 0.0
    if plan.guide:
        plan.guide.training, plan.guide.ddo = plan.train.training, replace(plan.train.ddo)
    plan.sampling = replace(plan.sampling, num_inference_steps=3, num_images=60, batch_size=60)
    plan.more_steps = 4 if plan.more_steps else 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "demo_plan", lambda data, quick: plan)
        assert main(["demo", "--quick", f"--data={request.param}", f"--output_dir={directory}"]) == 0
    return request.param, directory


def test_demo_writes_what_was_learned_samples_and_report(run):
    data, directory = run
    model, _ = load_denoiser(data)
    if data == "digits":
        patch = Patch.from_pretrained(directory)
        assert any(bool(prompt.any()) for prompt in patch.prompts)
        patch.attach(model)
    else:
        lora = open_artifact(directory, "LoRA").put_on(model)
        assert lora.config.rank == 8
    samples = load_file(directory / "samples.safetensors")
    assert all(images.shape == (60, 1, SIZES[data], SIZES[data]) for images in samples.values())
    assert set(samples) == {"base", "patched"} | ({"guided"} if data == "fashion" else set())
    assert not torch.equal(samples["base"], samples["patched"])
    assert (samples["base"] - samples["patched"]).abs().mean() < 0.6, "the same noise gives related images"


def test_the_guide_is_what_a_user_samples_with(run):
    data, directory = run
    if data == "digits":
        return
    model, scheduler = load_denoiser(data)
    chosen = SamplingConfig(
        num_inference_steps=3, timestep_spacing="trailing", num_images=60, batch_size=60, seed=demo.SEEDS[0]
    )
    attach_guide(model, scheduler, replace(chosen, guide=str(directory / "guide")))
    samples = load_file(directory / "samples.safetensors")
    evaluator = Evaluator.load(data, DataConfig(source=data), data, directory)
    torch.testing.assert_close(evaluator.sample(model, scheduler, chosen), samples["guided"])
    assert not torch.equal(samples["guided"], samples["base"])


def test_report_shows_the_measured_numbers(run):
    data, directory = run
    page = (directory / "report.html").read_text()
    assert page.count(" --sampling.timestep_spacing trailing ") == 2 * (data == "fashion")  # in its commands
    metrics = json.loads((directory / "metrics.json").read_text())
    assert len(metrics["base"]) == len(demo.SEEDS) == 3
    mean = sum(value["fid_held_out"] for value in metrics["base"]) / 3
    for text in (f"{mean:.3f} ±", "quick: too short to judge by", f"stagepatch demo --data {data} --quick"):
        assert text in page
    titles = re.findall(r"<h2>([^<]+)", page)
    assert {"Verdict", "Samples", "Training", "Config", "Environment", "Again"} <= set(titles)
    assert ("Gate activation" in titles) == (data == "digits")
    assert page.count('type="range"') == (2 if data == "fashion" else 1)
    assert page.count("data:image/png") == (6 if data == "fashion" else 5)
    assert f">{TRAINED[data]:,}<" in page
    assert ("4 sampling steps in place of 3" in page) == (data == "fashion")


def rows(changes):
    base = Measured([{"fid_held_out": 10.0, "recall": 0.5}] * 3, torch.empty(0))
    return {
        "base": base,
        "patched": Measured([{"fid_held_out": 10.0 + c, "recall": 0.5} for c in changes], base.images),
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([-1.0, -1.1, -0.9], "gains"), ([1.0, 1.1, 0.9], "does not gain"), ([-1.0, -2.0, -0.1], "No gain to be told")],
)
def test_verdict_follows_the_numbers(changes, expected):
    measured = {25: rows(changes)}
    assert expected in demo.verdict(measured, quick=False)
    assert "quick" in demo.verdict(measured, quick=True)
    assert "quick" not in demo.verdict(measured, quick=False)


def test_the_gain_stands_beside_more_sampling_steps():
    measured = {25: rows([-1.0] * 3), 50: rows([-2.0] * 3)}
    measured[50]["base"] = rows([-0.5] * 3)["patched"]
    said = demo.verdict(measured, quick=False)
    assert "changes by -10.0 [-10.0, -10.0] %" in said
    more = "50 sampling steps in place of 25 give -5.0 [-5.0, -5.0] % without it, and -20.0 [-20.0, -20.0] % with it"
    assert more in said
    measured[25]["guided"] = rows([-4.0] * 3)["patched"]
    said = demo.verdict(measured, quick=False)
    assert "The base with its guide, at the cost of 50 steps: -40.0 [-40.0, -40.0] %" in said
    columns, cells = demo.gain_table(measured)
    assert [row[columns.index("calls of the model")] for row in cells] == ["25", "25", "50", "50", "50"]
    assert [row[columns.index("change to the first row")] for row in cells] == [
        "",
        "-10.0 [-10.0, -10.0] %",
        "-40.0 [-40.0, -40.0] %",
        "-5.0 [-5.0, -5.0] %",
        "-20.0 [-20.0, -20.0] %",
    ]


def test_a_change_has_the_interval_of_a_paired_t_test():
    columns, cells = demo.gain_table({25: rows([-1.0, -2.0, -1.5])})
    low, high = scipy.stats.ttest_rel([9.0, 8.0, 8.5], [10.0] * 3).confidence_interval(0.95)
    assert cells[1][columns.index("change to the first row")] == f"-15.0 [{10 * low:+.1f}, {10 * high:+.1f}] %"


@pytest.mark.parametrize("name", list(BUNDLED))
def test_a_bundled_model_is_small(name):
    weights = BUNDLED[name] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 3_000_000
