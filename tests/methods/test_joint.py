"""Weights and a patch trained together: what moves, what is kept, and that it is what each does alone."""

import json
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.families import predict
from stagepatch.methods import Finetune, Joint, load_learned, open_artifact
from stagepatch.patch import Patch, PatchConfig
from stagepatch.sampling import ExpertSource
from stagepatch.sampling.experts_file import load_expert
from tests import runs
from tests.runs import Strike, assert_same, draw_weights, make_model, make_objective, options, run

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = {key: runs.MODEL[key] for key in ("sample_size", "in_channels", "hidden_size", "num_layers", "num_classes")}
MODEL = options("model", {**SMALL, "num_attention_heads": 2})
TRAINING = options("training", {**runs.TRAINING, "steps": 4})
BATCH = (
    torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)),
    torch.tensor([5, 500, 900]),
    torch.arange(3),
)


def pretrain(directory, *more):
    return main(["pretrain", f"--output_dir={directory}", *MODEL, *TRAINING, *more])


def output_of(model):
    with torch.no_grad():
        return predict(model, *BATCH)


class Still(Joint):
    """With the patch's learning rate at zero."""

    def prepare(self, model):
        groups = super().prepare(model)
        of_patch = set(self.patch.parameters())
        return [{**group, "factor": group["factor"] * (group["params"][0] not in of_patch)} for group in groups]


def test_all_weights_and_the_patch_train_as_groups_of_one_optimizer():
    model, method = make_model(), Joint(PatchConfig(gate_learning_rate_factor=0.25))
    groups = method.prepare(model)
    assert [group["factor"] for group in groups] == [1.0, 1.0, 0.25]
    trained = [parameter for group in groups for parameter in group["params"]]
    assert set(trained) == {*model.parameters(), *method.patch.parameters()}
    of_patch = 2 * 16 * 16 + 16 * (16 + 1) + 16  # L·N·D + (D+1)·N + N
    assert sum(value.numel() for value in trained) == sum(value.numel() for value in model.parameters()) + of_patch
    assert not model.training
    assert method.patch.training  # the released gate's noise is of training alone
    assert Joint(PatchConfig(initialization="normal")).starts_at_base is False


def test_gradients_are_those_of_the_sum_of_both_losses():
    """Against autograd on loss and balance loss written apart; the gate's goes on into the timestep embedding."""
    model, method = make_model(), Joint(PatchConfig(importance_weight=2.0, load_weight=3.0))
    groups = method.prepare(model)
    draw_weights(method.patch.parameters(), std=1.0)
    parameters = [parameter for group in groups for parameter in group["params"]]
    predict(model, *BATCH).square().mean().backward(retain_graph=True)
    denoising = [parameter.grad.clone() for parameter in parameters]
    terms = method.patch.balance_terms()
    balance = torch.autograd.grad(2.0 * terms["importance"] + 3.0 * terms["load"], parameters, allow_unused=True)
    for parameter in parameters:
        parameter.grad = None
    loss = predict(model, *BATCH).square().mean()
    (loss + method.extra_loss()[0]).backward()
    for parameter, one, other in zip(parameters, denoising, balance, strict=True):
        torch.testing.assert_close(parameter.grad, one if other is None else one + other)
        assert parameter.grad.abs().max() > 0
    named = dict(zip([*dict(model.named_parameters()), *method.patch.named_tensors()], balance, strict=True))
    moved = {name.split(".")[0] for name, value in named.items() if value is not None and value.abs().max() > 0}
    assert moved == {"t_embedder", "gate"}


def test_with_the_patchs_rate_at_zero_the_weights_train_as_alone(tmp_path):
    choices = {"steps": 5, "ema_decay": 0.9, "learning_rate": 1e-2}
    run(tmp_path / "alone", method=Finetune(make_objective().scheduler), **choices)
    still = run(tmp_path / "still", method=Still(scheduler=make_objective().scheduler), **choices)
    moved = run(tmp_path / "moved", method=Joint(scheduler=make_objective().scheduler), **choices)
    alone, with_patch, together = (load_file(tmp_path / name / WEIGHTS) for name in ("alone", "still", "moved"))
    assert_same(with_patch, alone)
    assert not any(value.any() for value in still.patch.parameters())
    assert all(value.any() for value in moved.patch.parameters())
    assert any(not torch.equal(value, alone[name]) for name, value in together.items())


@pytest.mark.parametrize("whole", [True, False], ids=["model directory", "weights"])
def test_saved_pair_gives_the_output_of_the_trained_pair(tmp_path, whole):
    model = make_model()
    method = Joint(scheduler=make_objective().scheduler if whole else None)
    run(tmp_path / "run", method=method, model=model, ema_decay=0.5, snapshot_every=3)
    expected = output_of(model)
    for place in ("run", "run/snapshots/0000003"):
        assert (tmp_path / place / "patch" / "config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the patch belongs to the weights as they are now
        other = make_model(std=0.7)
        if whole:
            assert open_artifact(tmp_path / "run").kind == "model"
            other, _ = load_denoiser(tmp_path / "run")
            load_learned(other, tmp_path / "run" / "patch")
        else:
            assert open_artifact(tmp_path / "run").kind == "weights and patch"
            assert isinstance(load_learned(other, tmp_path / "run"), Joint)
    assert torch.equal(output_of(other), expected)
    bare = make_model(std=0.7) if not whole else load_denoiser(tmp_path / "run")[0]
    if not whole:
        load_learned(bare, tmp_path / "run" / "weights")
    assert not torch.allclose(output_of(bare), expected, atol=1e-6)
    assert Patch.from_pretrained(tmp_path / "run" / "patch").facts["weights"] == "trained together with it"


def test_a_second_result_replaces_the_first_and_half_a_pair_is_none(tmp_path):
    model, method = make_model(), Joint()
    method.prepare(model)
    draw_weights(method.patch.parameters())
    method.save(tmp_path / "one")
    draw_weights([*model.parameters(), *method.patch.parameters()], seed=4)
    method.save(tmp_path / "two")
    expected = output_of(model)
    loaded = load_learned(other := make_model(), tmp_path / "one")
    loaded.load(other, tmp_path / "two")
    assert torch.equal(output_of(other), expected)
    (tmp_path / "two" / "weights" / "weights.safetensors").unlink()
    assert not Joint.is_saved_in(tmp_path / "two")


def test_a_pair_can_be_an_expert_and_leaves_the_base_as_it_was(tmp_path):
    model, method = make_model(), Joint()
    method.prepare(model)
    draw_weights([*model.parameters(), *method.patch.parameters()], seed=4)
    method.save(tmp_path)
    base = make_model()
    before = output_of(base)
    expert = load_expert(ExpertSource("pair", learned=str(tmp_path)), base, make_objective().scheduler)
    assert torch.equal(output_of(expert), output_of(model))
    assert torch.equal(output_of(base), before)


def test_it_trains_on_from_a_pair(tmp_path):
    model, method = make_model(), Joint()
    method.prepare(model)
    draw_weights([*model.parameters(), *method.patch.parameters()], seed=4)
    method.save(tmp_path)
    other, again = make_model(), Joint()
    groups = again.prepare(other)
    again.start_from(other, tmp_path)
    assert torch.equal(output_of(other), output_of(model))
    assert {*other.parameters(), *again.patch.parameters()} == {value for each in groups for value in each["params"]}


def joint_job(directory):
    run(directory, method=Joint(PatchConfig(**runs.RELEASED), scheduler=make_objective().scheduler), **runs.EVERYTHING)


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """A run with gate noise, EMA, warmup and decay, label dropout, clipping and snapshots."""
    directory = tmp_path_factory.mktemp("undisturbed")
    processes.call(joint_job, directory=directory)
    return directory


@pytest.mark.parametrize(
    "strike",
    [
        Strike("half", 3),
        Strike("half", 3, "model.safetensors"),
        Strike("half", 3, "diffusion_pytorch_model.safetensors"),
    ],
    ids=["checkpoint", "patch", "weights"],
)
def test_killed_it_ends_as_undisturbed(processes, undisturbed, tmp_path, strike):
    processes.call(joint_job, -signal.SIGKILL, directory=tmp_path, strike=strike)
    assert not (tmp_path / WEIGHTS).exists()  # they come last
    processes.call(joint_job, directory=tmp_path)
    for name in (WEIGHTS, "patch/model.safetensors", "checkpoint.safetensors", f"snapshots/0000005/{WEIGHTS}"):
        assert_same(load_file(tmp_path / name), load_file(undisturbed / name))
    assert (tmp_path / "patch/config.json").read_text() == (undisturbed / "patch/config.json").read_text()


def test_pretraining_with_a_patch_is_sampled_and_measured_as_any_pair(tmp_path):
    more = ["--method=joint", "--patch.gate_learning_rate_factor=2.0", "--training.snapshot_every=2"]
    assert pretrain(tmp_path / "run", *more) == 0
    saved = Patch.from_pretrained(tmp_path / "run" / "patch")
    assert saved.config.gate_learning_rate_factor == 2.0
    assert saved.facts["base model"] == str(tmp_path / "run")
    few = ["--sampling.num_images=3", "--sampling.num_inference_steps=2"]
    images = {}
    for name, model in {"pair": "run", "bare": "run", "early": "run/snapshots/0000002"}.items():
        patch = "" if name == "bare" else tmp_path / model / "patch"
        places = [f"--model={tmp_path / model}", f"--patch={patch}"]
        assert main(["sample", *places, *few, f"--output_dir={tmp_path / name}"]) == 0
        (images[name],) = load_file(tmp_path / name / "samples.safetensors").values()
    assert not torch.equal(images["pair"], images["bare"])
    assert not torch.equal(images["pair"], images["early"])


def test_options_that_change_nothing_of_plain_pretraining_and_whose_runs_do_not_mix(tmp_path, capsys):
    assert pretrain(tmp_path / "run", "--method=joint") == 0
    assert pretrain(tmp_path / "run") == 2
    assert "method was joint, is None" in capsys.readouterr().err
    assert pretrain(tmp_path / "none", "--method=joint", "--training.steps=0") == 2
    assert "trains no patch" in capsys.readouterr().err
    assert not (tmp_path / "none" / "transformer").exists()


def test_from_a_model_as_it_was_drawn_finetuning_is_pretraining(tmp_path):
    """So a comparison's rows from scratch are pretraining, bit for bit."""
    assert pretrain(tmp_path / "drawn", "--training.steps=0") == 0
    assert pretrain(tmp_path / "whole") == 0
    arguments = ["train", f"--model={tmp_path / 'drawn'}", f"--output_dir={tmp_path / 'run'}", *TRAINING]
    assert main([*arguments, "--method=finetune"]) == 0
    assert_same(load_file(tmp_path / "run" / "weights.safetensors"), load_file(tmp_path / "whole" / WEIGHTS))
    assert pretrain(tmp_path / "joint", "--method=joint") == 0
    arguments[2] = f"--output_dir={tmp_path / 'joint-run'}"
    assert main([*arguments, "--method=joint"]) == 0
    learned = tmp_path / "joint-run"
    assert_same(load_file(learned / "weights" / "weights.safetensors"), load_file(tmp_path / "joint" / WEIGHTS))
    assert_same(*(load_file(path / "patch" / "model.safetensors") for path in (learned, tmp_path / "joint")))


def test_a_pair_is_told_and_not_merged(tmp_path, capsys):
    save_denoiser(make_model(), make_objective().scheduler, tmp_path / "model")
    arguments = [f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'run'}", "--method=joint"]
    assert main(["train", *arguments, *TRAINING, "--dtype=bfloat16"]) == 2
    assert "which dtype='bfloat16' spoils" in capsys.readouterr().err
    assert main(["train", *arguments, *TRAINING]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "trained weights" in told
    assert "patch: sites" in told
    assert main(["merge", f"--base={tmp_path / 'model'}", f"--stages=[{tmp_path / 'run'}]", "--weights=[1]"]) == 2
    assert "patches are not merged" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "importance", "load", "gate_entropy"} <= set(log[-1])
