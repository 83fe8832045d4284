"""Snapshots of one training, against averages that were tracked, and against sums by hand."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.core import UserError
from stagepatch.merging import find_snapshots, merge_posthoc
from stagepatch.methods import DMP, Finetune, LoRA, LoRAConfig, load_learned, open_artifact
from stagepatch.patch import PatchConfig
from tests.runs import RELEASED, assert_same, make_model, run

SIGMAS = [0.05, 0.1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LEARNED = {
    "patch": (lambda: DMP(PatchConfig(**RELEASED)), "model.safetensors"),
    "LoRA": (lambda: LoRA(LoRAConfig(rank=2)), "pytorch_lora_weights.safetensors"),
    "weights": (Finetune, "weights.safetensors"),
}


def distance(tensors, expected):
    """Of all numbers together, in float64."""
    return sum(float((tensors[name].double() - expected[name].double()).square().sum()) for name in expected) ** 0.5


@pytest.mark.parametrize("sigma", [0.07, 0.15])
def test_average_nears_the_tracked_one_as_more_snapshots_are_saved(tmp_path, sigma):
    run(tmp_path / "tracked", method="finetune", steps=40, snapshot_every=40, posthoc_ema=[sigma])
    tracked = load_file(tmp_path / "tracked" / "posthoc_ema" / str(sigma) / "0000040" / WEIGHTS)
    last = load_file(tmp_path / "tracked" / WEIGHTS)
    errors, differences = [], []
    for every in (40, 10, 5, 2):
        directory = tmp_path / str(every)
        run(directory, method="finetune", steps=40, snapshot_every=every, posthoc_ema=SIGMAS)
        differences.append(merge_posthoc(directory, sigma, directory / "out"))
        errors.append(distance(load_file(directory / "out" / WEIGHTS), tracked) / distance(last, tracked))
    assert errors == sorted(errors, reverse=True)
    assert differences == sorted(differences, reverse=True)
    assert errors[0] > 30 * errors[-1]
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("kind", LEARNED)
def test_what_was_learned_is_averaged_and_loads(tmp_path, kind):
    make, file = LEARNED[kind]
    run(tmp_path / "run", method=make(), steps=8, snapshot_every=2, posthoc_ema=SIGMAS)
    merge_posthoc(tmp_path / "run", 0.1, tmp_path / "out")
    expected = load_file(tmp_path / "run" / "posthoc_ema" / "0.1" / "0000008" / file)
    assert_same(load_file(tmp_path / "out" / file), expected, 1e-6)
    assert distance(load_file(tmp_path / "run" / file), expected) > 1e-3
    assert open_artifact(tmp_path / "out").kind == kind
    load_learned(make_model(), tmp_path / "out")


def test_a_model_has_the_parts_of_its_pipeline(tmp_path):
    run(tmp_path / "run", method="finetune", steps=2, snapshot_every=1, posthoc_ema=SIGMAS)
    (tmp_path / "run" / "vae").mkdir()
    (tmp_path / "run" / "vae" / "config.json").write_text("{}")
    merge_posthoc(tmp_path / "run", 0.07, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scheduler", "transformer", "vae"]


def test_an_average_that_was_half_written_is_passed_over(tmp_path):
    run(tmp_path / "run", method="finetune", steps=4, snapshot_every=2, posthoc_ema=SIGMAS)
    (tmp_path / "run" / "posthoc_ema" / "0.1" / "0000004" / WEIGHTS).unlink()
    merge_posthoc(tmp_path / "run", 0.05, tmp_path / "out")
    expected = load_file(tmp_path / "run" / "posthoc_ema" / "0.05" / "0000004" / WEIGHTS)
    assert_same(load_file(tmp_path / "out" / WEIGHTS), expected, 1e-6)


def test_runs_without_averages_say_what_can_be_done(tmp_path):
    run(tmp_path / "plain", method="finetune", steps=4, snapshot_every=2)
    run(tmp_path / "none", method="finetune", steps=1)
    with pytest.raises(UserError, match=r"no averages for post-hoc EMA: train with .* its 2 plain snapshots a mean"):
        merge_posthoc(tmp_path / "plain", 0.08, tmp_path / "out")
    with pytest.raises(UserError, match=r"posthoc_ema=\[0\.05, 0\.1\] and training\.snapshot_every\.$"):
        merge_posthoc(tmp_path / "none", 0.08, tmp_path / "out")
    with pytest.raises(UserError, match="no snapshots besides its result"):
        find_snapshots(tmp_path / "none")
    with pytest.raises(UserError, match="Nothing at"):
        find_snapshots(tmp_path / "nowhere")


def test_snapshots_of_other_models_are_not_averaged(tmp_path):
    run(tmp_path / "run", method="finetune", steps=2, snapshot_every=1, posthoc_ema=SIGMAS)
    path = tmp_path / "run" / "posthoc_ema" / "0.05" / "0000001" / WEIGHTS
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"0\.05/0000001/.*' is of another model than"):
        merge_posthoc(tmp_path / "run", 0.08, tmp_path / "out")


def by_hand(result, snapshots, weights):
    left = 1.0 - sum(weights)
    return {
        name: left * value.double() + sum(w * one[name].double() for w, one in zip(weights, snapshots, strict=True))
        for name, value in result.items()
    }


@pytest.mark.parametrize("kind", ["model", *LEARNED])
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_snapshots_are_merged_into_the_result(tmp_path, kind, ema_decay):
    make, file = LEARNED.get(kind, (lambda: "finetune", WEIGHTS))
    run(tmp_path / "run", method=make(), steps=6, snapshot_every=2, ema_decay=ema_decay)
    base = "" if kind == "model" else "digits"
    snapshots = find_snapshots(tmp_path / "run", base)
    # The last step's snapshot is the result, whether averaged or not.
    assert [path.name for path in snapshots.directories] == ["0000002", "0000004"]
    snapshots.merge([1.5, -0.75], tmp_path / "out")
    parts = [load_file(directory / file) for directory in (tmp_path / "run", *snapshots.directories)]
    found = {name: value.double() for name, value in load_file(tmp_path / "out" / file).items()}
    assert_same(found, by_hand(parts[0], parts[1:], [1.5, -0.75]), 2e-6)
    assert open_artifact(tmp_path / "out").kind == kind
    with pytest.raises(UserError, match="1 weights for 2 stages"):
        snapshots.merge([1.0], tmp_path / "out")
    if kind != "model":
        load_learned(make_model(), tmp_path / "out")
        with pytest.raises(UserError, match="does not say which model"):
            find_snapshots(tmp_path / "run")


def test_a_last_snapshot_that_is_not_the_result_counts(tmp_path):
    run(tmp_path / "run", method="finetune", steps=5, snapshot_every=2)
    assert [path.name for path in find_snapshots(tmp_path / "run").directories] == ["0000002", "0000004"]
    shutil.rmtree(tmp_path / "run" / "transformer")
    with pytest.raises(UserError, match="but an unfinished run"):
        find_snapshots(tmp_path / "run")
