"""A run that was stopped, however it was stopped, ends as if it had not been."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import main
from stagepatch.core import Interrupted
from stagepatch.core.errors import UserError
from stagepatch.core.tensors import read_tensors, write_tensors
from stagepatch.methods import DMP
from stagepatch.patch import PatchConfig
from stagepatch.training.checkpoint import TrainingState
from stagepatch.training.log import RunLog
from stagepatch.training.signals import StopSignals
from tests import runs
from tests.runs import Strike, assert_same, iteration_of, log_of, make_model, patch_of, run, train_job

RUN = {"patch": runs.RELEASED, "flip": True, **runs.EVERYTHING}


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    """A run with gate noise, EMA, warmup and decay, label dropout, flips, clipping and snapshots."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    processes.call(train_job, directory=directory, **RUN)
    return directory


def assert_ends_alike(directory, expected):
    for name in ("model.safetensors", "checkpoint.safetensors", "snapshots/0000005/model.safetensors"):
        assert_same(load_file(directory / name), load_file(expected / name))
    assert (directory / "config.json").read_text() == (expected / "config.json").read_text()
    assert [record["iteration"] for record in log_of(directory)] == [2, 4, 6, 8, 10, 12]
    assert not list(directory.glob(".checkpoint*")), "an unfinished checkpoint is left"


def kill_and_go_on(processes, directory, strike):
    processes.call(train_job, -signal.SIGKILL, directory=directory, strike=strike, **RUN)
    processes.call(train_job, directory=directory, **RUN)


STRIKES = {
    "before the first checkpoint": Strike("iteration", 2),
    "between checkpoints": Strike("iteration", 5),
    "first checkpoint half written": Strike("half", 1),
    "second checkpoint half written": Strike("half", 2),
    "checkpoint written and not renamed": Strike("written", 2),
    "checkpoint just renamed": Strike("renamed", 3),
    "patch of a snapshot half written": Strike("half", 1, "model.safetensors"),
    "last checkpoint renamed, nothing saved": Strike("renamed", 4),
    "patch half written": Strike("half", 3, "model.safetensors"),
    "after the end": Strike("renamed", 3, "config.json"),
}


@pytest.mark.parametrize("strike", STRIKES.values(), ids=STRIKES)
def test_killed_run_ends_as_the_uninterrupted_one(processes, uninterrupted, tmp_path, strike):
    kill_and_go_on(processes, tmp_path, strike)
    assert_ends_alike(tmp_path, uninterrupted)


def test_run_killed_again_and_again_ends_as_the_uninterrupted_one(processes, uninterrupted, tmp_path):
    # At arbitrary moments, imports of the process included.
    for delay in (0.05, 0.1, 0.15, 0.2, 0.3):
        process = processes.start(train_job, directory=tmp_path, **RUN)
        time.sleep(delay * random.uniform(0.5, 2.0))
        process.kill()
        process.join()
    processes.call(train_job, directory=tmp_path, **RUN)
    assert_ends_alike(tmp_path, uninterrupted)


def test_record_cut_short_is_written_anew(processes, uninterrupted, tmp_path):
    processes.call(train_job, -signal.SIGKILL, directory=tmp_path, strike=Strike("iteration", 10), **RUN)
    # The checkpoint is of iteration 9; the records of 2, 4, 6 and 8 stay as they were.
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"iteration": 10, "lo')
    before = (tmp_path / "log.jsonl").read_text().splitlines()[:4]
    processes.call(train_job, directory=tmp_path, **RUN)
    assert (tmp_path / "log.jsonl").read_text().splitlines()[:4] == before
    assert_ends_alike(tmp_path, uninterrupted)


def test_logged_values_are_those_of_the_uninterrupted_run(processes, uninterrupted, tmp_path):
    kill_and_go_on(processes, tmp_path, Strike("iteration", 8))
    for record, expected in zip(log_of(tmp_path), log_of(uninterrupted), strict=True):
        del record["images_per_second"], expected["images_per_second"]
        assert record == expected


def test_finetuning_killed_ends_as_the_uninterrupted_one(processes, tmp_path):
    choices = {**runs.EVERYTHING, "method": "finetune"}
    processes.call(train_job, directory=tmp_path / "a", **choices)
    processes.call(train_job, -signal.SIGKILL, directory=tmp_path / "b", strike=Strike("half", 3), **choices)
    processes.call(train_job, directory=tmp_path / "b", **choices)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / "b" / weights), load_file(tmp_path / "a" / weights))


@pytest.mark.parametrize("same_objects", [True, False])
def test_interrupted_here_and_trained_on_here(tmp_path, monkeypatch, same_objects):
    # As in a notebook: Ctrl-C, and the cell once more.
    training = {"checkpoint_every": 4, "steps": 9}
    run(tmp_path / "whole", runs.RELEASED, **training)
    parts = {"model": make_model(), "method": DMP(PatchConfig(**runs.RELEASED)), "objective": runs.make_objective()}
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "advance", RunLog.advance)  # what is armed lasts as long as this
        runs.arm(Strike("iteration", 5, signum=signal.SIGINT))
        with pytest.raises(Interrupted, match="iteration 5 of 9") as stopped:
            run(tmp_path / "cut", **parts, **training)
    assert stopped.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not same_objects:
        parts |= {"model": make_model(), "method": DMP(PatchConfig(**runs.RELEASED))}
    run(tmp_path / "cut", **parts, **training)
    assert_same(patch_of(tmp_path / "cut"), patch_of(tmp_path / "whole"))
    assert [record["iteration"] for record in log_of(tmp_path / "cut")] == list(range(1, 10))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`stagepatch train` on a tiny model and the digits, without the output_dir."""
    directory = tmp_path_factory.mktemp("model")
    save_denoiser(make_model(), runs.make_objective().scheduler, directory)
    training = {**runs.TRAINING, "steps": 200, "log_every": 5}
    return ["train", f"--model={directory}", *runs.options("training", training)]


@pytest.fixture(scope="module")
def uninterrupted_command(processes, command, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    processes.call(main, arguments=[*command, f"--output_dir={directory}"])
    return directory


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_writes_a_checkpoint_and_says_how_to_go_on(
    processes, command, uninterrupted_command, tmp_path, signum, code
):
    arguments = [*command, f"--output_dir={tmp_path}"]
    text = processes.call(main, code, arguments=arguments, strike=Strike("iteration", 17, signum=signum))
    checkpoint = str(tmp_path / "checkpoint.safetensors")
    assert all(part in text for part in ("Stopped at iteration 17 of 200", checkpoint, "Give the same command again"))
    assert "Traceback" not in text
    assert not (tmp_path / "model.safetensors").exists()
    assert iteration_of(tmp_path) == 17
    processes.call(main, arguments=arguments)
    assert_same(patch_of(tmp_path), patch_of(uninterrupted_command))
    assert [record["iteration"] for record in log_of(tmp_path)] == list(range(5, 201, 5))


def test_ctrl_c_from_outside(processes, command, uninterrupted_command, tmp_path):
    arguments = [*command, f"--output_dir={tmp_path}"]
    process = processes.start(main, arguments=arguments)
    log = tmp_path / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    text = processes.finish(process, 130)
    assert "Give the same command again" in text
    assert "Traceback" not in text
    processes.call(main, arguments=arguments)
    assert_same(patch_of(tmp_path), patch_of(uninterrupted_command))


def test_signal_in_the_last_iteration_changes_nothing(processes, command, uninterrupted_command, tmp_path):
    strike = Strike("iteration", 200, signum=signal.SIGTERM)
    processes.call(main, arguments=[*command, f"--output_dir={tmp_path}"], strike=strike)
    assert_same(patch_of(tmp_path), patch_of(uninterrupted_command))


def test_second_signal_acts_as_usual():
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_outside_the_main_thread_are_left_alone():
    former = signal.getsignal(signal.SIGTERM)

    def inside():
        with StopSignals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert pool.submit(inside).result() == former


SHORT = {"identity": {"patch": {"gate": "linear"}}, "steps": 2}


@pytest.fixture
def stopped(tmp_path):
    """The directory of a run that is done, from which a longer one cannot go on."""
    run(tmp_path, **SHORT)
    return tmp_path


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"steps": 3}, "training.steps was 2, is 3"),
        ({"seed": 4}, "training.seed was 0, is 4"),
        ({"ema_decay": 0.9}, "training.ema_decay was 0.0, is 0.9"),
        ({"batch_size": 4}, "training.batch_size was 8, is 4"),
        ({"identity": {"patch": {"gate": "none"}}}, "patch.gate was linear, is none"),
        ({"identity": {}}, "patch.gate was linear, is None"),
    ],
)
def test_other_settings_are_refused_by_name(stopped, choices, message):
    before = patch_of(stopped)
    with pytest.raises(UserError, match=message):
        run(stopped, **{**SHORT, **choices})
    assert_same(patch_of(stopped), before)


def test_bookkeeping_may_change(processes, uninterrupted, tmp_path):
    processes.call(train_job, -signal.SIGKILL, directory=tmp_path, strike=Strike("iteration", 7), **RUN)
    other = {"log_every": 3, "checkpoint_every": 2, "snapshot_every": 0, "tensorboard": True, "report_every": 0.0}
    processes.call(train_job, directory=tmp_path, **{**RUN, **other})
    assert_same(patch_of(tmp_path), patch_of(uninterrupted))
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_truncated_checkpoint(stopped):
    path = stopped / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors' is not a whole safetensors file"):
        run(stopped, **SHORT)


def test_foreign_checkpoint(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of stagepatch"):
        run(tmp_path)


@pytest.mark.parametrize("other", [{"num_layers": 3}, {"num_layers": 1}, {"hidden_size": 32}, {"sample_size": 16}])
def test_checkpoint_of_another_model(stopped, other):
    # The settings agree; it is the model that was exchanged.
    with pytest.raises(UserError, match=r"checkpoint\.safetensors' .* trained\."):
        run(stopped, model=make_model(**other), **SHORT)


def test_a_checkpoint_written_before_an_option_existed_is_gone_on_from(tmp_path):
    run(tmp_path, steps=2)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    identity = json.loads(metadata["identity"])
    del identity["training"]["ema_power"]
    write_tensors(path, tensors, {**metadata, "identity": json.dumps(identity)})
    run(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"training\.ema_power was 0\.0, is 0\.5"):
        run(tmp_path, steps=2, ema_power=0.5)


@pytest.mark.parametrize(
    "odd",
    [
        *({"iteration": value} for value in ("x", "-3", "")),
        *({"identity": value} for value in ("{", "5", "[1]", "[" * 9999)),
        *({"optimizer": value} for value in ('{"groups": 1', "5", '{"groups.x.lr": 1}', '{"0": 1}')),
        *({"scaler": value} for value in ("{", "5")),
        {"scaler": None},
    ],
    ids=lambda odd: str(odd)[:30],
)
def test_a_checkpoint_whose_metadata_are_odd_is_refused(tmp_path, odd):
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer, scaler = torch.optim.AdamW(weights), torch.amp.GradScaler("cpu")
    state = TrainingState(tmp_path / "checkpoint.safetensors", {"model": "digits"}, weights, optimizer, None, scaler)
    state.save(3)
    tensors, metadata = read_tensors(state.path)
    write_tensors(state.path, tensors, {name: value for name, value in (metadata | odd).items() if value is not None})
    with pytest.raises(UserError, match=r"checkpoint.safetensors' is not as it was written"):
        state.load()


def test_an_option_younger_than_a_checkpoint_had_its_default(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(2))]
    optimizer, scaler = torch.optim.AdamW(weights), torch.amp.GradScaler(enabled=False)
    state = TrainingState(tmp_path / "checkpoint.safetensors", {"model": "digits"}, weights, optimizer, None, scaler)
    state.save(3)
    assert replace(state, identity={"model": "digits", "dtype": "float32"}).load() == 3
    with pytest.raises(UserError, match="dtype was float32, is bfloat16"):
        replace(state, identity={"model": "digits", "dtype": "bfloat16"}).load()
