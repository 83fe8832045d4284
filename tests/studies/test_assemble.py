"""`stagepatch assemble`: experts at several scales, then a router, which goes on where it was stopped."""

import json
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.core import read_json
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.methods import load_learned, open_artifact
from stagepatch.methods.lora import FILE_NAME
from stagepatch.studies import AssembleConfig
from tests.runs import Strike, iteration_of
from tests.studies.conftest import study, write_config

TRAINING = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 2, "tensorboard": False}
LORA = {"rank": 2, "scales": [4, 2, 1]}


def values_of(model, **changes):
    return {"model": str(model), "training": TRAINING, "assembling": {"steps": 6}, "lora": LORA, **changes}


def assemble(folder, model, **changes):
    return study("assemble", folder, **values_of(model, **changes))


@pytest.fixture
def model(tmp_path, tiny_dit):
    save_denoiser(tiny_dit(), make_scheduler(ObjectiveConfig(), True), tmp_path / "model")
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(folder / "out" / FILE_NAME)


@pytest.mark.parametrize("kind", ["router", "time_router"])
def test_experts_train_on_their_ranges_and_the_router_on_all(tmp_path, model, seen, batch, kind, capsys):
    assert assemble(tmp_path, model, lora={**LORA, "stage_gate": kind}) == 0
    out, start = tmp_path / "out", 0
    for count in (4, 2, 1):
        for number in range(count):
            own = seen[start : start + 4]
            timesteps = torch.cat([draws.timesteps for draws in own])
            assert 1000 // count * number <= int(timesteps.min())
            assert int(timesteps.max()) < 1000 // count * (number + 1)
            start += 4
    routed = torch.cat([draws.timesteps for draws in seen[start:]])
    assert len(seen[start:]) == 6
    assert routed.min() < 250 < 750 < routed.max()
    assert len({tuple(draws.noise.flatten().tolist()) for draws in seen}) == len(seen)

    assert open_artifact(out).kind == "LoRA"
    stages = [out / "scales" / str(count) / "stages" / str(number) for count in (4, 2, 1) for number in range(count)]
    assembled, experts = tensors_of(tmp_path), [load_file(stage / FILE_NAME) for stage in stages]
    for name, value in assembled.items():
        if "stage_gate" in name:
            assert value.abs().max() > 0, name
            continue
        if "weighed_by_timestep" in name:
            continue
        is_down = name.endswith("lora_A.weight")
        assert torch.equal(value, torch.cat([expert[name] for expert in experts], dim=0 if is_down else 1))
    loaded = load_denoiser(model)[0]
    load_learned(loaded, out)
    base = load_denoiser(model)[0]
    assert not torch.allclose(predict(loaded, *batch), predict(base, *batch), atol=1e-4)

    seen.clear()
    assert assemble(tmp_path, model, lora={**LORA, "stage_gate": kind}) == 0
    assert not seen
    text = capsys.readouterr().out
    assert "7 experts, 7 of them done" in text
    assert "1 router, 1 of them done" in text
    assert main(["assemble", f"--config={out / 'run.yaml'}"]) == 0  # the resolved config is itself a config


def test_a_killed_router_goes_on_to_the_same_weights(tmp_path, model, processes):
    changes = {"assembling": {"steps": 40, "learning_rate": 0.1}, "lora": {"rank": 2, "scales": [2, 1]}}
    assert assemble(tmp_path / "whole", model, **changes) == 0
    path = write_config(tmp_path / "killed", **values_of(model, **changes))
    # Three experts of four steps come before it.
    processes.call(
        main, -signal.SIGKILL, arguments=["assemble", f"--config={path}"], strike=Strike("iteration", 12 + 21)
    )
    directory = tmp_path / "killed" / "out"
    assert not (directory / "assembly.json").exists()
    assert iteration_of(directory) == 20
    assert open_artifact(directory).kind == "unfinished run"
    assert assemble(tmp_path / "killed", model, **changes) == 0
    whole, killed = (tensors_of(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_digits_from_experts_to_a_row_of_a_comparison(tmp_path):
    """The bundled model, in a few steps: sampled as a patch and as a schedule, and compared with its parts."""
    given = {"lora": {"rank": 1, "scales": [2, 1]}, "assembling": {"steps": 2}, "training": {**TRAINING, "steps": 2}}
    assert assemble(tmp_path, "digits", **given) == 0
    out = tmp_path / "out"
    few = ["--sampling.num_images=10", "--sampling.num_inference_steps=2"]
    images = []
    for name, place in (("patch", out), ("schedule", out / "experts.yaml")):
        assert main(["sample", f"--{name}={place}", f"--output_dir={tmp_path / name}", *few]) == 0
        images.append(load_file(tmp_path / name / "samples.safetensors")["images"])
    assert torch.equal(*images)
    entries = [
        {"name": "base", "method": "none"},
        {"name": "two experts", "method": "none", "schedule": str(out / "scales" / "2" / "experts.yaml")},
        {"name": "assembled", "method": "none", "schedule": str(out / "experts.yaml")},
        {
            "name": "assembled here",
            "method": "lora",
            "lora": {"rank": 1, "scales": [2, 1], "stage_gate": "router"},
            "start_from": str(out / "start"),
        },
    ]
    sampling = {"num_images": 60, "num_inference_steps": 2, "batch_size": 60}
    values = {"entries": entries, "sampling": sampling, "training": {"steps": 2, "batch_size": 8}}
    assert study("compare", tmp_path / "compared", **values) == 0
    rows = json.loads((tmp_path / "compared" / "out" / "results.json").read_text())
    assert {row["name"] for row in rows} == {entry["name"] for entry in entries}


def test_schedules_name_the_experts(tmp_path, model):
    assert assemble(tmp_path, model, lora={"rank": 1, "scales": [2, 1]}) == 0
    out = tmp_path / "out"
    assert yaml.safe_load((out / "experts.yaml").read_text()) == {"experts": [{"from": 0, "to": 1000, "learned": "."}]}
    scale = yaml.safe_load((out / "scales" / "2" / "experts.yaml").read_text())["experts"]
    assert scale[1] == {"from": 500, "to": 1000, "learned": "stages/1"}
    stage = read_json(out / "scales" / "2" / "stages" / "1" / "stage.json")
    assert (stage["p"], stage["consistency"], stage["projection"]) == (0.0, 0.0, False)
    assert (stage["lora"]["stage_gate"], stage["lora"]["scales"]) == ("gaussian", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dmp"}, "A router mixes LoRAs: set method='dmp' to lora"),
        ({"lora": {"stage_gate": "learned"}}, "stage_gate='learned' is no router"),
        ({"lora": {"scales": [1, 2]}}, "scales=[1, 2] must be at least two numbers of experts, falling"),
        ({"lora": {"scales": [1001, 1]}}, "1000 timesteps cannot be split into 1001 ranges"),
        ({"assembling": {"step": 3}}, "assembling has no key 'step'"),
        ({"timesteps": {"range": [0.0, 0.5]}}, "timesteps are those of each expert"),
        ({"objective": "ddo"}, "leave out objective='ddo'"),
    ],
)
def test_what_cannot_be_assembled_is_refused_before_any_trains(tmp_path, model, refused, changes, message):
    assert message in refused("assemble", **values_of(model, **changes))
    assert not (tmp_path / "out" / "scales").exists()


def test_another_router_or_other_experts_are_not_taken_for_done(tmp_path, model, capsys):
    given = {"lora": {"rank": 1, "scales": [2, 1]}}
    assert assemble(tmp_path, model, **given) == 0
    assert assemble(tmp_path, model, **given, assembling={"steps": 7}) == 2
    assert "holds a router of another config (training.steps was 6, is 7)" in capsys.readouterr().err
    assert assemble(tmp_path, model, lora={"rank": 2, "scales": [2, 1]}) == 2
    assert "holds a stage of another config (lora.rank was 1, is 2)" in capsys.readouterr().err


def test_what_was_moved_counts_as_done(tmp_path, model, seen):
    assert assemble(tmp_path / "here", model) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    seen.clear()
    assert assemble(tmp_path / "there", model) == 0
    assert not seen


def test_defaults_are_the_papers_scales():
    config = AssembleConfig()
    assert (config.lora.scales, config.lora.stage_gate) == ([8, 4, 2, 1], "router")
    assert config.router_training == config.training


def test_a_comparison_refuses_a_router_without_experts(tmp_path, capsys):
    entries = [{"name": "router", "method": "lora", "lora": {"scales": [2, 1], "stage_gate": "router"}}]
    assert study("compare", tmp_path, entries=[{"name": "base", "method": "none"}, *entries]) == 2
    assert "`stagepatch assemble` trains both" in capsys.readouterr().err
