"""Small forms of the commands that write, what they need, and what they leave behind."""

import hashlib
import json
import os
import shutil
from functools import cache
from unittest.mock import MagicMock

import sklearn.datasets
import yaml
from matplotlib.figure import Figure
from PIL import Image

from stagepatch.cli import app, main

_TRAINING = ["--training.batch_size=4", "--training.log_every=1"]
_KEPT = [
    *(
        "--training.steps=2",
        "--training.checkpoint_every=1",
        "--training.snapshot_every=1",
        "--training.ema_decay=0.5",
    ),
    "--training.report_every=0.000001",  # at each record
]
_SAMPLING = ["--sampling.num_inference_steps=2", "--sampling.num_images=40"]
_HELD_OUT = ["--validation.loss_every=2", "--validation.loss_images=4"]
_MODEL = ["--model.sample_size=8", "--model.in_channels=1", "--model.hidden_size=16", "--model.num_layers=1"]
_MODEL += ["--model.num_attention_heads=2", "--model.num_classes=10"]
_DECOUPLE = ["decouple", "--num_stages=2", "--training.steps=2", "--launch.executor=debug", *_TRAINING]
_LATENT = ["--model=inputs/pipeline", "--data.source=inputs/images", "--data.image_size=32"]
_TINY = "--model=inputs/model"
_COMPARE = """
model: inputs/model
output_dir: out
entries: [{name: base, method: none}, {name: DMP, method: dmp}]
training_seeds: [0]
evaluate_every: 2
training: {steps: 4, checkpoint_every: 2}
launch: {executor: debug}
"""
# What the others read.
INPUTS = [
    ["pretrain", "--output_dir=inputs/model", "--training.steps=1", *_MODEL, *_TRAINING],
    ["train", _TINY, "--output_dir=inputs/patch", "--training.steps=1", *_TRAINING],
    [*_DECOUPLE, _TINY, "--output_dir=inputs/stages"],
]
_SEARCH = ["--search.strategies=[grid,tpe]", "--search.evaluations=3", "--search.coarse=[0,1]", "--search.fine=[0]"]
COMMANDS = {
    "train": ["train", _TINY, *_TRAINING, *_KEPT, *_HELD_OUT],
    "pretrain": ["pretrain", *_MODEL, *_TRAINING, *_KEPT, "--training.posthoc_ema=[0.1]"],
    "cache": ["cache", *_LATENT, "--data.crop=buckets", "--data.bucket_step=16"],
    "train on latents": ["train", *_LATENT, *_TRAINING, "--training.steps=2", "--training.checkpoint_every=1"],
    "sample": ["sample", _TINY, "--patch=inputs/patch", *_SAMPLING],
    "evaluate": ["evaluate", _TINY, "--patch=inputs/patch", *_SAMPLING, "--seeds=[0,1]"],
    "compare": ["compare", "--config=inputs/compare.yaml", *_TRAINING, *_SAMPLING],
    "decouple": [*_DECOUPLE, _TINY, "--training.checkpoint_every=1"],
    "merge": ["merge", "--stages=[inputs/stages]", "--weights=[0.3,0.6]"],
    "merge, searched": ["merge", "--stages=[inputs/stages]", *_SEARCH, *_SAMPLING],
    "schedule": [
        *("schedule", _TINY, "--zoo=[{name: patched, learned: inputs/patch}]", "--evaluations=3", "--seeds=[5]"),
        *("--sampling.num_images=40", "--sampling.num_inference_steps=3", "--budget=0.7"),
    ],
}
# What says when, where and how long something ran.
_VARYING = ("images_per_second", "seconds", "seconds_per_step", "peak_memory", "seconds per image")
_OF_THE_TIME = (
    "*.tfevents.*",
    "report.html",
    "table.csv",
    "table.md",
    "run.lock",
    "lock",
    "*.lock",
    "search.journal",
    "search.png",
)

_parser, _digits = cache(app._make_parser), cache(sklearn.datasets.load_digits)


def command(arguments, directory):
    """A command, for a process of its own. What takes time and writes nothing is left out or kept.

    Plots are a pixel, measured times 10 ms, intervals of two groups; the digits are read and parsers made once.
    """
    from stagepatch.evaluation import uncertainty
    from stagepatch.report import pictures
    from stagepatch.search import engine, schedule_search

    os.chdir(directory)
    Figure.add_subplot = lambda *arguments, **options: MagicMock()
    pictures._save = lambda picture, file: Image.new("L", (1, 1)).save(file, format="PNG")
    app._make_parser = _parser
    sklearn.datasets.load_digits = _digits
    uncertainty.measure_left_out.__defaults__ = (None, 2)
    engine._CLAIM, engine._POLL = 0.2, 0.02
    schedule_search.median_seconds = lambda calls, rounds: dict.fromkeys(calls, 0.01)
    return main(arguments)


def at_work(name):
    return [*COMMANDS[name], "--output_dir=out"]


def write_inputs(directory):
    """What no command makes."""
    from tests.golden.record import _write_pipeline

    (directory / "inputs").mkdir(parents=True)
    _write_pipeline(directory / "inputs" / "pipeline", directory / "inputs" / "images")
    (directory / "inputs" / "compare.yaml").write_text(_COMPARE)


def new_place(inputs, directory):
    """An empty directory that has the inputs."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "inputs").symlink_to(inputs.resolve())
    return directory


def facts(directory):
    """What each file of a directory holds, as a hash."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    kept = [path for path in paths if not any(path.match(pattern) for pattern in _OF_THE_TIME)]
    return {str(path.relative_to(directory)): _digest(path) for path in kept if path.parent.name[-8:] != ".workers"}


def _digest(path):
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".yaml"):
        text = content.decode()
        held = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else yaml.safe_load(text)
        content = json.dumps(_lasting(held), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _lasting(value):
    if isinstance(value, dict):
        return {name: _lasting(held) for name, held in value.items() if name not in _VARYING}
    return [_lasting(held) for held in value] if isinstance(value, list) else value
