"""`stagepatch diagnose` from end to end: page, numbers, advice, and a message for each mistake."""

import json

import pytest
import torch
from PIL import Image

from stagepatch.analysis import free
from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from tests.runs import run
from tests.training.test_train_on_pipelines import draw_images

SHORT = ["--steps=4", "--images=12", "--timesteps=4", "--batch_size=4", "--rates=[1e-3]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that was trained for a moment, with its snapshots."""
    directory = tmp_path_factory.mktemp("base")
    run(directory, method="pretrain", steps=4, snapshot_every=1)
    return directory


def diagnosed(base, output, *more):
    assert main(["diagnose", str(base), "digits", f"--output_dir={output}", *SHORT, *more]) == 0
    return json.loads((output / "diagnosis.json").read_text())


def test_a_page_and_numbers_with_advice_by_places(base, tmp_path, capsys):
    numbers = diagnosed(base, tmp_path, "--samples=0")
    assert "What is worth trying" in capsys.readouterr().out
    assert (numbers["model"], numbers["data"]) == (str(base), "digits")
    assert set(numbers["verdicts"]) == {
        *("converged", "converged_other_density", "over_fitted", "shares_too_little", "limited_by", "stages")
    }
    assert [each["key"] for each in numbers["methods"]] == ["finetune", "lora", "stage_lora", "dmp", "ddo"]
    for each in numbers["methods"]:
        assert each["refused"] == ""
        assert each["seconds"] > 0 < each["parameters"]
    assert numbers["methods"][-1]["sample_seconds"] > 0
    assert len(numbers["losses"]["training_images"]["mean"]) == len(numbers["losses"]["timesteps"]) == 4
    assert all({"key", "title", "why", "evidence", "command"} == set(each) for each in numbers["advice"])
    assert "sampling" in {each["key"] for each in numbers["advice"]}
    assert (tmp_path / "report.html").read_text().count("data:image/png") == 2
    for name in ("losses", "gradients"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 600


def test_what_costs_nothing_is_measured(base, tmp_path, monkeypatch):
    monkeypatch.setattr(free, "STEPS", 2)
    numbers = diagnosed(base, tmp_path, "--samples=8", f"--snapshots={base}")
    assert [each["calls"] for each in numbers["free"]] == [2, 4, 2, 2, 4, 4, 3]
    assert numbers["free"][0]["change"]["mean"] == 0
    assert all(each["change"]["mean"] != 0 for each in numbers["free"][1:])
    assert numbers["average_of_snapshots"]["low"] < numbers["average_of_snapshots"]["high"]
    weights = free.weights_of_mean(base)
    assert weights == [0, 0, 0.5]  # the fourth snapshot is the result, which has the other half
    assert main(["merge", f"--run={base}", f"--weights={weights}", f"--output_dir={tmp_path / 'mean'}"]) == 0
    merged, *later = (
        load_denoiser(path)[0] for path in (tmp_path / "mean", *sorted((base / "snapshots").iterdir())[2:])
    )
    for name, value in merged.named_parameters():
        mean = sum(model.get_parameter(name) for model in later) / 2
        torch.testing.assert_close(value, mean)


def test_what_was_not_trained_on_must_be_said(base, tmp_path, capsys):
    draw_images(tmp_path / "images", 4)
    assert main(["diagnose", str(base), str(tmp_path / "images"), f"--output_dir={tmp_path}"]) == 2
    assert "not trained on? Give --held_out" in capsys.readouterr().err


def test_steps_that_cannot_be_are_refused(base, tmp_path, capsys):
    assert main(["diagnose", str(base), "digits", f"--output_dir={tmp_path}", "--rates=[0]"]) == 2
    assert "rates=[0.0] must be learning rates above 0" in capsys.readouterr().err
