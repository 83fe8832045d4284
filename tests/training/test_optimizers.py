"""Optimizers by name: each is its library's class, goes on bit for bit, and refuses what it cannot be."""

import copy
import importlib
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stagepatch.core import Interrupted, UserError
from stagepatch.core.tensors import read_tensors, write_tensors
from stagepatch.training.log import RunLog
from stagepatch.training.optimizers import learning_rate_of, make_optimizer, own_average, restore_state, state_of
from tests import runs
from tests.runs import assert_same, config_of, patch_of, run

# Their module and class, what the class is given by hand, and a state that only it has.
LIBRARIES = {
    "adamw": ("torch.optim", "AdamW", {"betas": (0.8, 0.9), "weight_decay": 0.1}, "exp_avg_sq"),
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", {"betas": (0.8, 0.9), "weight_decay": 0.1}, "absmax1"),
    "adafactor": (
        "transformers.optimization",
        "Adafactor",
        {"weight_decay": 0.1, "relative_step": False, "scale_parameter": False},
        "exp_avg_sq_row",
    ),
    "prodigy": ("prodigyopt", "Prodigy", {"betas": (0.8, 0.9), "weight_decay": 0.1}, "groups.0.d"),
    "schedule_free": ("schedulefree", "AdamWScheduleFree", {"betas": (0.8, 0.9), "weight_decay": 0.1}, "z"),
    "muon": ("torch.optim", "Muon", {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}, "momentum_buffer"),
}
# Else so small tensors would have a state of 32 bits.
OPTIONS = {"adamw_8bit": {"min_8bit_size": 16}}
RATES = {"prodigy": 1.0}
TRAINING = {"adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.1}


@pytest.fixture(params=LIBRARIES)
def name(request):
    pytest.importorskip(LIBRARIES[request.param][0].split(".")[0])
    return request.param


def config_for(name, **choices):
    own = {"optimizer": name, "optimizer_options": OPTIONS.get(name, {}), "learning_rate": RATES.get(name, 1e-2)}
    return config_of(**{**TRAINING, **own, **choices})


def layer():
    torch.manual_seed(0)
    return nn.Linear(8, 16)


def take_steps(model, optimizer, count, first=0):
    for number in range(first, first + count):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model, config):
    return make_optimizer([{"params": list(model.parameters()), "lr": config.learning_rate}], config)


def test_steps_are_those_of_the_librarys_class(name):
    module, class_name, arguments, _ = LIBRARIES[name]
    config, ours, theirs = config_for(name), layer(), layer()
    library_class = getattr(importlib.import_module(module), class_name)
    arguments = {**arguments, **OPTIONS.get(name, {}), "lr": config.learning_rate}
    take_steps(ours, optimizer := optimizer_of(ours, config), 5)
    if name == "muon":  # of matrices alone
        by_hand = library_class([theirs.weight], **arguments)
        rest = torch.optim.AdamW([theirs.bias], config.learning_rate, betas=(0.8, 0.9), weight_decay=0.1)
        by_hand.register_step_post_hook(lambda *_: (rest.step(), rest.zero_grad()))
    else:
        by_hand = library_class(theirs.parameters(), **arguments)
    if name == "schedule_free":
        by_hand.train()
    take_steps(theirs, by_hand, 5)
    assert_same(ours.state_dict(), theirs.state_dict())
    assert not torch.equal(ours.weight, layer().weight)
    found = by_hand.param_groups[0]["d"] if name == "prodigy" else 1.0
    assert learning_rate_of(optimizer) == config.learning_rate * found


def test_what_is_restored_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    config, whole = config_for(name), layer()
    take_steps(whole, kept := optimizer_of(whole, config), 3)
    values = copy.deepcopy(state_of(kept))
    again = copy.deepcopy(whole)
    take_steps(whole, kept, 3, first=3)
    fresh = optimizer_of(again, config)
    restore_state(fresh, values)
    take_steps(again, fresh, 3, first=3)
    assert_same(again.state_dict(), whole.state_dict())
    assert {key: str(value) for key, value in state_of(fresh).items()} == {
        key: str(value) for key, value in state_of(kept).items()
    }


def interrupted(directory, monkeypatch, after, **choices):
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "advance", RunLog.advance)  # what is armed lasts as long as this
        runs.arm(runs.Strike("iteration", after, signum=signal.SIGINT))
        with pytest.raises(Interrupted):
            run(directory, **choices)


def test_run_that_was_stopped_ends_as_one_that_was_not(name, tmp_path, monkeypatch):
    choices = {**vars(config_for(name)), "steps": 6, "warmup_steps": 2, "max_grad_norm": 0.5, "snapshot_every": 4}
    run(tmp_path / "whole", **choices)
    interrupted(tmp_path / "cut", monkeypatch, 3, **choices)
    run(tmp_path / "cut", **choices)
    assert_same(patch_of(tmp_path / "cut"), patch_of(tmp_path / "whole"))
    for file in ("checkpoint.safetensors", "snapshots/0000004/model.safetensors"):
        assert_same(load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file))
    tensors, metadata = read_tensors(tmp_path / "whole" / "checkpoint.safetensors")
    state = LIBRARIES[name][-1]
    assert any(key.endswith(state) for key in tensors) or f'"{state}"' in metadata["optimizer"]


def test_checkpoint_of_before_optimizers_had_names_is_gone_on_from(tmp_path, monkeypatch):
    choices = {"steps": 6, "weight_decay": 0.1}
    run(tmp_path / "whole", **choices)
    interrupted(tmp_path / "cut", monkeypatch, 3, **choices)
    path = tmp_path / "cut" / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    assert metadata.pop("optimizer")
    write_tensors(path, tensors, metadata)
    run(tmp_path / "cut", **choices)
    assert_same(patch_of(tmp_path / "cut"), patch_of(tmp_path / "whole"))


def test_schedule_free_saves_its_average_and_trains_on_from_where_it_was(tmp_path):
    pytest.importorskip("schedulefree")
    config, model = config_for("schedule_free"), layer()
    take_steps(model, optimizer := optimizer_of(model, config), 3)
    before = copy.deepcopy(model.state_dict())
    average = own_average(optimizer, list(model.parameters()))
    assert_same(model.state_dict(), before)
    optimizer.eval()
    assert_same(list(model.parameters()), average)
    assert not torch.equal(model.weight, before["weight"])
    method = run(tmp_path / "plain", **vars(config_for("schedule_free", steps=4)))
    trained = read_tensors(tmp_path / "plain" / "checkpoint.safetensors")[0]
    for index, prompt in enumerate(method.patch.prompts):
        assert torch.equal(prompt, patch_of(tmp_path / "plain")[f"prompts.blocks.{index}"])
        assert not torch.equal(prompt, trained[f"trained.{index}"])
    # Neither a snapshot nor a checkpoint moves what trains.
    run(tmp_path / "often", **vars(config_for("schedule_free", steps=4, snapshot_every=1, checkpoint_every=2)))
    assert_same(patch_of(tmp_path / "often"), patch_of(tmp_path / "plain"))


def test_adafactor_at_its_own_rate(tmp_path):
    options = {"relative_step": True, "scale_parameter": True, "warmup_init": True}
    model = layer()
    optimizer = optimizer_of(model, config_for("adafactor", optimizer_options=options, weight_decay=0.0))
    by_hand = copy.deepcopy(model)
    from transformers.optimization import Adafactor

    take_steps(model, optimizer, 3)
    take_steps(by_hand, Adafactor(by_hand.parameters(), **options), 3)
    assert_same(model.state_dict(), by_hand.state_dict())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"optimizer_options": {"momentum": 0.9}},
            "AdamW has no momentum, or it is an option of training. It has: a",
        ),
        ({"optimizer_options": {"lr": 1.0}}, "AdamW has no lr"),
        ({"optimizer_options": {"eps": -1.0}}, "optimizer='adamw' cannot be had: Invalid epsilon"),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "averages what it trains itself"),
        ({"optimizer": "prodigy", "patch": runs.RELEASED}, "finds one learning rate for all that trains"),
        ({"optimizer": "muon", "optimizer_options": {"adjust_lr_fn": "x"}}, "Adjust learning rate function x"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, choices, message):
    pytest.importorskip(LIBRARIES[choices.get("optimizer", "adamw")][0].split(".")[0])
    with pytest.raises(UserError, match=message):
        run(tmp_path, **choices)


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(UserError, match=r"needs prodigyopt .*: pip install 'prodigyopt', or 'stagepatch.optimizers"):
        run(tmp_path, optimizer="prodigy")


def test_prodigy_says_that_its_rate_is_a_factor(caplog):
    pytest.importorskip("prodigyopt")
    optimizer_of(layer(), config_for("prodigy"))
    assert not caplog.records
    optimizer_of(layer(), config_for("prodigy", learning_rate=1e-4))
    assert "training.learning_rate=0.0001: give 1" in caplog.text
