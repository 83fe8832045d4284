"""`stagepatch merge --run`: what one training saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.methods import load_learned
from stagepatch.search import merge_search
from tests.runs import MODEL, TRAINING, assert_same, options

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
MODEL_OPTIONS = options("model", MODEL)
SAVED = options("training", {**TRAINING, "steps": 8, "snapshot_every": 2, "posthoc_ema": [0.05, 0.1]})
SEARCH = ["--search.strategies=[lcsc]", "--search.low=-1", "--sampling.num_inference_steps=2"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A tiny model's run on digits."""
    directory = tmp_path_factory.mktemp("runs") / "pretrained"
    assert main(["pretrain", f"--output_dir={directory}", *MODEL_OPTIONS, *SAVED]) == 0
    return directory


@pytest.fixture(scope="module")
def finetuned(pretrained):
    """All weights of it, trained on."""
    directory = pretrained.parent / "finetuned"
    assert main(["train", f"--model={pretrained}", f"--output_dir={directory}", "--method=finetune", *SAVED]) == 0
    return directory


def merge(*arguments):
    return main(["merge", *map(str, arguments)])


def refused(capsys, *arguments):
    assert merge(*arguments) == 2
    return capsys.readouterr().err


def test_average_of_any_length(pretrained, finetuned, tmp_path, capsys):
    given = ["--posthoc_ema=0.08", f"--output_dir={tmp_path / 'out'}"]
    assert merge(f"--run={pretrained}", *given) == 0
    assert "sigma_rel 0.08 is in" in capsys.readouterr().out
    load_denoiser(tmp_path / "out")
    assert "posthoc_ema: 0.08" in (tmp_path / "out" / "run.yaml").read_text()
    assert merge(f"--run={finetuned}", "--posthoc_ema=0.05", f"--output_dir={tmp_path / 'tuned'}") == 0
    kept = load_file(finetuned / "posthoc_ema" / "0.05" / "0000008" / "weights.safetensors")
    assert_same(load_file(tmp_path / "tuned" / "weights.safetensors"), kept, 1e-6)
    assert "must be above 0 and below" in refused(capsys, f"--run={pretrained}", "--posthoc_ema=0.4")
    assert "give run, its directory" in refused(capsys, *given)
    assert "leave out stages, weights" in refused(capsys, f"--run={pretrained}", *given, "--weights=[1]")
    assert "not both" in refused(capsys, f"--run={pretrained}", "--stages=[a]", "--weights=[1]")


def test_the_mean_of_snapshots(pretrained, tmp_path):
    # Of steps 2, 4 and 6, and of 8, the result.
    assert merge(f"--run={pretrained}", "--weights=[0.25, 0.25, 0.25]", f"--output_dir={tmp_path}") == 0
    files = [pretrained / "snapshots" / f"000000{step}" / WEIGHTS for step in (2, 4, 6, 8)]
    parts = [load_file(file) for file in files]
    assert_same(load_file(tmp_path / WEIGHTS), {name: sum(p[name] for p in parts) / 4 for name in parts[0]}, 1e-6)


def test_what_a_run_cannot_be_given(pretrained, finetuned, tmp_path, capsys):
    output = f"--output_dir={tmp_path / 'out'}"
    assert "leave out base" in refused(capsys, f"--run={pretrained}", "--base=digits", "--weights=[1, 1, 1]", output)
    for more in (["--weights=[1, 1, 1]"], SEARCH):
        refusal = refused(capsys, f"--run={finetuned}", "--ties_keep=0.5", *more, output)
        assert "Snapshots are not merged by 'ties'" in refusal
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pretrained", "finetuned"])
def test_search_finds_a_known_combination(request, name, tmp_path, monkeypatch, capsys):
    # The objective is the distance from a combination that is beyond all averages.
    directory, best = request.getfixturevalue(name), [-0.3, 0.5, 0.4]
    given = [f"--run={directory}", f"--output_dir={tmp_path / 'best'}", f"--weights={best}"]
    assert merge(*given) == 0

    def weights_of(output):
        if name == "pretrained":
            return load_denoiser(output)[0].state_dict()
        model, _ = load_denoiser(request.getfixturevalue("pretrained"))
        load_learned(model, output)
        return model.state_dict()

    target = weights_of(tmp_path / "best")

    class Distance(merge_search.SampledMetric):
        def __call__(self, model, scheduler, sampling, report=None):
            return sum(float((value - target[name]).square().sum()) for name, value in model.state_dict().items())

    monkeypatch.setattr(merge_search, "SampledMetric", Distance)
    out = tmp_path / "out"
    assert merge(f"--run={directory}", f"--output_dir={out}", *SEARCH, "--search.evaluations=120") == 0
    evaluations = json.loads((out / "search.json").read_text())["strategies"]["lcsc"]
    values = [one["value"] for one in evaluations]
    assert len(values) == 120
    assert evaluations[0]["weights"] == [0.0, 0.0, 0.0]  # the training's result
    assert evaluations[1]["weights"] == pytest.approx([1 / 3] * 3)
    assert min(values) < min(values[:10]) / 50
    found = min(evaluations, key=lambda one: one["value"])["weights"]
    assert found == pytest.approx(best, abs=0.1)
    assert found[0] < 0.0
    merged = weights_of(out)
    distance = sum(float((value - target[name]).square().sum()) for name, value in merged.items())
    assert distance == pytest.approx(min(values), rel=1e-3)


@pytest.mark.parametrize("name", ["pretrained", "finetuned"])
def test_search_on_fid(request, name, tmp_path, capsys):
    directory = request.getfixturevalue(name)
    given = [f"--run={directory}", f"--output_dir={tmp_path}", *SEARCH, "--sampling.num_images=12"]
    assert "must be above 10" in refused(capsys, *given, "--search.evaluations=10")
    assert merge(*given, "--search.evaluations=12") == 0
    assert "lcsc" in capsys.readouterr().out
    found = json.loads((tmp_path / "search.json").read_text())
    values = [one["value"] for one in found["strategies"]["lcsc"]]
    assert len(values) == 12
    assert len(set(values)) > 6
    assert found["best"]["value"] == min(values)
    merge(f"--run={directory}", f"--weights={found['best']['weights']}", f"--output_dir={tmp_path / 'by hand'}")
    file = WEIGHTS if name == "pretrained" else "weights.safetensors"
    assert_same(load_file(tmp_path / file), load_file(tmp_path / "by hand" / file))
    journal = (tmp_path / "search.journal").stat().st_size
    assert merge(*given, "--search.evaluations=12") == 0  # all is there already
    assert (tmp_path / "search.journal").stat().st_size - journal < 5000
    assert json.loads((tmp_path / "search.json").read_text()) == found
    assert torch.isfinite(torch.tensor(values)).all()
