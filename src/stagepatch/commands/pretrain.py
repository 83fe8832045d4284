"""Train a DiT from scratch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from stagepatch import config as configs
from stagepatch.commands.common import RUN_CONFIG, say
from stagepatch.data import load_dataset
from stagepatch.diffusion import Objective, make_scheduler
from stagepatch.files import write_text
from stagepatch.methods import Pretrain
from stagepatch.models import DIT_SIZES, DiT
from stagepatch.training import train as run_training
from stagepatch.training.randomness import GLOBAL, seed_for


def pretrain(config: configs.PretrainConfig, resolved: str) -> None:
    """Train a DiT from scratch and save it as a model directory."""
    directory = Path(config.output_dir)
    dataset = load_dataset(config.data)
    torch.manual_seed(seed_for(GLOBAL, config.training.seed))
    model = _make_model(config.model, config.training.label_dropout)
    scheduler = make_scheduler(config.objective, config.model.learn_sigma)
    objective = Objective(scheduler, config.model.learn_sigma)
    identity = {name: asdict(getattr(config, name)) for name in ("model", "objective", "data")}
    run_training(
        model,
        Pretrain(scheduler),
        objective,
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
        on_start=lambda: write_text(directory / RUN_CONFIG, resolved),
    )
    say(f"The model is in '{directory}'.")


def _make_model(config: configs.ModelConfig, label_dropout: float) -> DiT:
    options = asdict(config)
    name = options.pop("name")
    if name:
        # A named size sets these itself.
        options = {key: value for key, value in options.items() if key not in DIT_SIZES["DiT-S/2"]}
        model: DiT = DiT.from_name(name, class_dropout_prob=label_dropout, **options)
    else:
        model = DiT(class_dropout_prob=label_dropout, **options)
    return model
