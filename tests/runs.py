"""Small runs, here or in a process of their own that dies where a test wants it to."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import torch
from safetensors.torch import load_file

from stagepatch.core.tensors import read_tensors
from stagepatch.data import ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.methods import DMP, Finetune
from stagepatch.models import DiT
from stagepatch.patch import PatchConfig
from stagepatch.training import BalancingConfig, TrainingConfig, train
from stagepatch.training.balancing import make_intervals
from stagepatch.training.log import RunLog
from tests.faults import strikes

MODEL = {
    "sample_size": 8,
    "in_channels": 1,
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_classes": 10,
}
TRAINING = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "tensorboard": False}
RELEASED = {"preset": "released"}
# By most jobs, each of which would take a second for it.
IMPORTED = ["pytest", "stagepatch.cli.train", "torch.distributed", "jsonargparse", "sklearn.datasets"]
# Everything that has a state or a draw of its own.
EVERYTHING = {
    "steps": 12,
    "lr_scheduler": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "ema_decay": 0.7,
    "label_dropout": 0.3,
    "log_every": 2,
    "checkpoint_every": 3,
    "snapshot_every": 5,
}


def draw_weights(parameters, std=0.3, seed=1):
    """Every parameter, drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std, generator=generator)


def make_model(seed=0, std=0.2, **overrides):
    """A DiT whose every weight is drawn, since adaLN-Zero's zeros would hide the blocks."""
    model = DiT(**{**MODEL, **overrides}).eval()
    draw_weights(model.parameters(), std, seed)
    return model


def make_dataset(count=30):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 1, 8, 8, generator=generator).clamp(-1, 1)
    return ImageDataset(images, torch.arange(count) % 10)


def make_objective(learn_sigma=True, **choices):
    return Objective(make_scheduler(ObjectiveConfig(**choices), learn_sigma), learn_sigma)


def config_of(**training):
    return TrainingConfig(**{**TRAINING, **training})


def options(section, settings):
    """Settings of a section as the command line takes them."""
    return [f"--{section}.{key}={str(value).lower()}" for key, value in settings.items()]


def run(directory, patch=None, method="dmp", model=None, dataset=None, identity=None, flip=False, **choices):
    """Train the tiny model by a method or one of that name; returns the method. Other choices are of the training."""
    objective = choices.pop("objective", None) or make_objective()
    balancing = BalancingConfig(**choices.pop("balancing", {}))
    if balancing.name != "none":
        objective.timesteps = make_intervals(balancing, objective)
    loading = {
        "balancing": balancing,
        "num_workers": choices.pop("num_workers", 0),
        "progress": choices.pop("progress", False),
        "checks": choices.pop("checks", ()),
        "report": choices.pop("report", None),
    }
    if isinstance(method, str):
        method = DMP(PatchConfig(**(patch or {}))) if method == "dmp" else Finetune(objective.scheduler)
    parts = model or make_model(), method, objective, dataset or make_dataset(), config_of(**choices)
    train(*parts, Path(directory), identity, flip, **loading)
    return method


def patch_of(directory):
    """The tensors of a run's patch."""
    return load_file(Path(directory) / "model.safetensors")


def iteration_of(directory):
    """That of a run's checkpoint."""
    return int(read_tensors(Path(directory) / "checkpoint.safetensors")[1]["iteration"])


def log_of(directory):
    return [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]


def assert_same(tensors, expected, tolerance=0.0):
    torch.testing.assert_close(tensors, expected, rtol=0, atol=tolerance)


def imported_by(code, *arguments):
    """The modules that a fresh interpreter has loaded when the code is done."""
    code = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@dataclass(frozen=True)
class Strike:
    """A signal that a process sends to itself.

    Args:
        where: 'iteration' (when the n-th is done, before it is logged), 'half' (with the n-th file of that name half
            written), 'written' (written, not yet renamed) or 'renamed'.
        number: n.
        name: of the file.
    """

    where: str
    number: int
    name: str = "checkpoint.safetensors"
    signum: int = signal.SIGKILL


def arm(strike):
    """Let this process be struck."""
    if isinstance(strike, strikes.FileStrike):
        strike.arm()
        return
    counted = itertools.count(1)

    def reached(name=strike.name):
        return name == strike.name and next(counted) == strike.number

    def hit():
        os.kill(os.getpid(), strike.signum)

    if strike.where == "iteration":
        advance = RunLog.advance

        def advance_and_hit(log):
            advance(log)
            if reached():
                hit()

        RunLog.advance = advance_and_hit
    elif strike.where == "half":
        fsync = os.fsync

        def cut_in_half(descriptor):
            if reached(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name[1:].rpartition(".")[0]):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                hit()
            fsync(descriptor)

        os.fsync = cut_in_half
    else:
        replace = Path.replace

        def replace_or_hit(path, target):
            due = reached(Path(target).name)
            if due and strike.where == "written":
                hit()
            replace(path, target)
            if due:
                hit()

        Path.replace = replace_or_hit


def train_job(directory, **choices):
    run(directory, **choices)


def _child(function, arguments, output, environment, strike):
    os.environ.pop(strikes.ENVIRONMENT, None)  # of the server's alone, not of what this starts
    if strike is not None:
        arm(strike)
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(function(**arguments))


@dataclass
class Processes:
    """Starts jobs as forks of one server that has imported everything, so that each starts at once."""

    folder: Path
    modules: Sequence[str] = ()  # that the server imports too
    started: list = field(default_factory=list)

    def __post_init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*IMPORTED, *self.modules])
        former = os.environ.get(strikes.ENVIRONMENT)
        os.environ[strikes.ENVIRONMENT] = str(strikes.library() or former or "")
        forkserver.ensure_running()
        os.environ.pop(strikes.ENVIRONMENT)
        if former is not None:
            os.environ[strikes.ENVIRONMENT] = former

    def start(self, function, environment=None, strike=None, **arguments):
        output = self.folder / f"{len(self.started)}.txt"
        process = self.context.Process(target=_child, args=(function, arguments, output, environment or {}, strike))
        process.output = output
        self.started.append(process)
        process.start()
        return process

    def finish(self, process, expected=0):
        """Wait for a job; its output."""
        process.join(120)
        text = process.output.read_text()
        assert process.exitcode == expected, text
        return text

    def call(self, function, expected=0, **arguments):
        """Start and wait; its output."""
        return self.finish(self.start(function, **arguments), expected)

    def call_together(self, function, count, **arguments):
        """One job in `count` processes that know of one another, as under `accelerate launch`; their output."""
        return [self.finish(process) for process in self.start_together(function, count, **arguments)]

    def start_together(self, function, count, strikes=None, **arguments):
        """`call_together` without its end; strikes are by the process's number."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
        strikes = strikes or {}
        return [self.start(function, each, strikes.get(rank), **arguments) for rank, each in enumerate(ranks)]

    def stop(self):
        for process in self.started:
            if process.is_alive():
                process.kill()
