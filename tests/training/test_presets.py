"""Recipes by name: defaults that what is given overrides, from the command line and in Python."""

from pathlib import Path

import pytest
import yaml

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.training import PRESETS, TrainConfig, apply_preset


def resolved(capsys, *given):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *given, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_what_is_given_wins_over_the_preset_and_the_preset_over_the_defaults(capsys, tmp_path):
    plain, recommended = resolved(capsys), resolved(capsys, "--preset=recommended")
    assert (plain["method"], plain["objective"], plain["training"]["steps"]) == ("dmp", "denoising", 50_000)
    recipe = PRESETS["recommended"]
    assert {name: recommended[name] for name in ("method", "objective")} == {
        name: recipe[name] for name in ("method", "objective")
    }
    assert recommended["training"] == plain["training"] | recipe["training"]
    (tmp_path / "own.yaml").write_text("preset: recommended\nlora: {num_stages: 3}\n")
    own = resolved(capsys, f"--config={tmp_path / 'own.yaml'}", "--training.steps=7")
    assert (own["lora"]["rank"], own["lora"]["num_stages"], own["training"]["steps"]) == (8, 3, 7)
    assert own["training"]["learning_rate"] == recipe["training"]["learning_rate"]


def test_python_has_the_same(capsys):
    config = apply_preset(TrainConfig(), "recommended")
    given = resolved(capsys, "--preset=recommended")
    assert (config.method, config.lora.rank, config.training.learning_rate) == (
        given["method"],
        given["lora"]["rank"],
        given["training"]["learning_rate"],
    )
    assert apply_preset(TrainConfig(), "paper") == TrainConfig()
    with pytest.raises(TypeError, match="preset"):  # as a field it would be taken and do nothing
        TrainConfig(preset="recommended")


def test_guide_is_what_the_rows_of_the_evidence_were_trained_by(capsys):
    guide = resolved(capsys, "--preset=guide")
    told = yaml.safe_load(Path("configs/fashion/guide_proof.yaml").read_text())
    (row,) = [row for row in told["entries"] if row["name"] == "guide"]
    assert (guide["method"], guide["objective"], guide["lora"]["rank"]) == (row["method"], row["objective"], 8)
    for name, value in told["training"].items():
        assert name == "compile" or guide["training"][name] == value, name


def test_stages_is_what_the_rows_of_the_evidence_were_trained_by(capsys):
    stages = resolved(capsys, "--preset=stages")
    told = yaml.safe_load(Path("configs/fashion/loras_proof.yaml").read_text())
    (row,) = [row for row in told["entries"] if row["name"] == "stage LoRA, r = 8, K = 4"]
    assert {name: stages["lora"][name] for name in row["lora"]} == row["lora"]
    assert (stages["method"], stages["objective"]) == (row["method"], "denoising")
    for name, value in {**told["training"], **row["training"]}.items():
        assert name in ("compile", "log_every") or stages["training"][name] == value, name


def test_a_resolved_config_gives_the_same_run_again(capsys, tmp_path):
    whole = resolved(capsys, "--preset=recommended", "--training.steps=7")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    assert resolved(capsys, f"--config={tmp_path / 'run.yaml'}") == whole


def test_an_unknown_preset_is_refused(capsys):
    assert main(["train", "--preset=best"]) == 2
    assert "recommended" in capsys.readouterr().err
    assert main(["train", "--presett=paper"]) == 2
    assert "Did you mean --preset?" in capsys.readouterr().err
    with pytest.raises(UserError, match="paper, recommended, stages, guide"):
        apply_preset(TrainConfig(), "best")
