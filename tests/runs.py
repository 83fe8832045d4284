"""Small runs, here or in a process of their own that dies where a test wants it to."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from stagepatch import cli
from stagepatch.core.tensors import write_tensors
from stagepatch.data import ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.methods import DMP, Finetune
from stagepatch.models import DiT
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig, generate
from stagepatch.training import TrainingConfig, train
from stagepatch.training.log import RunLog

MODEL = {
    "sample_size": 8,
    "in_channels": 1,
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_classes": 10,
}
TRAINING = {
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "log_every": 1,
    "checkpoint_every": 100,
    "tensorboard": False,
}
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


def make_model(seed=0, **overrides):
    """A DiT whose every weight is drawn, since adaLN-Zero's zeros would hide the blocks."""
    model = DiT(**{**MODEL, **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def make_dataset(count=30):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 1, 8, 8, generator=generator).clamp(-1, 1)
    return ImageDataset(images, torch.arange(count) % 10)


def make_objective(learn_sigma=True, **choices):
    return Objective(make_scheduler(ObjectiveConfig(**choices), learn_sigma), learn_sigma)


def run(
    directory,
    patch=None,
    method="dmp",
    model=None,
    dataset=None,
    identity=None,
    flip=False,
    objective=None,
    **training,
):
    """Train the tiny model; returns the method."""
    model = model or make_model()
    objective = objective or make_objective()
    chosen = DMP(PatchConfig(**(patch or {}))) if method == "dmp" else Finetune(objective.scheduler)
    config = TrainingConfig(**{**TRAINING, **training})
    dataset = dataset or make_dataset()
    train(model, chosen, objective, dataset, config, Path(directory), identity, flip, progress=False)
    return chosen


def patch_of(directory):
    """The tensors of a run's patch."""
    return load_file(Path(directory) / "model.safetensors")


def log_of(directory):
    return [json.loads(line) for line in (Path(directory) / "log.jsonl").read_text().splitlines()]


def assert_same(tensors, expected, tolerance=0.0):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


# What runs in another process.


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
    count = 0

    def reached(name=strike.name):
        nonlocal count
        count += name == strike.name
        return name == strike.name and count == strike.number

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


def train_job(directory, strike=None, **choices):
    if strike is not None:
        arm(strike)
    run(directory, **choices)


def command_job(arguments, strike=None):
    """The command line, with its exit code."""
    if strike is not None:
        arm(strike)
    return cli.main(arguments)


def train_and_sample_job(directory, sampling, **choices):
    """Every process writes the images that it gets."""
    model = make_model()
    run(directory, model=model, **choices)
    images = generate(model, make_objective().scheduler, SamplingConfig(**sampling))
    write_tensors(Path(directory) / f"images-{os.environ.get('RANK', 0)}.safetensors", {"images": images})


def _child(function, arguments, output, environment):
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
    started: list = field(default_factory=list)

    def __post_init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pytest", "stagepatch.cli.train", "torch.distributed"])

    def start(self, function, environment=None, **arguments):
        output = self.folder / f"{len(self.started)}.txt"
        process = self.context.Process(target=_child, args=(function, arguments, output, environment or {}))
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
        """One job in `count` processes that know of one another, as under `accelerate launch`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
        processes = [self.start(function, environment, **arguments) for environment in ranks]
        return [self.finish(process) for process in processes]

    def stop(self):
        for process in self.started:
            if process.is_alive():
                process.kill()
