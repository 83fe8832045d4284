"""What each command does, from its config to its files and its printed result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from stagepatch import config as configs
from stagepatch.backbones import learns_sigma, load_denoiser
from stagepatch.data import load_dataset
from stagepatch.diffusion import Objective, make_scheduler
from stagepatch.files import write_text
from stagepatch.methods import DMP, Finetune, Method
from stagepatch.models import DIT_SIZES, DiT
from stagepatch.training import train as run_training

RUN_CONFIG = "run.yaml"


def pretrain(config: configs.PretrainConfig, resolved: str) -> None:
    """Train a DiT from scratch and save it as a model directory."""
    import torch

    from stagepatch.training.randomness import GLOBAL, seed_for

    directory = Path(config.output_dir)
    dataset = load_dataset(config.data)
    write_text(directory / RUN_CONFIG, resolved)
    torch.manual_seed(seed_for(GLOBAL, config.training.seed))
    model = _make_model(config.model, config.training.label_dropout)
    scheduler = make_scheduler(config.objective, config.model.learn_sigma)
    objective = Objective(scheduler, config.model.learn_sigma)
    identity = {name: asdict(getattr(config, name)) for name in ("model", "objective", "data")}
    run_training(
        model,
        Finetune(scheduler),
        objective,
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
    )
    print(f"The model is in '{directory}'.")


def _make_model(config: configs.ModelConfig, label_dropout: float) -> DiT:
    sizes = {name: value for name, value in asdict(config).items() if name != "name"}
    if config.name:
        sizes = {name: value for name, value in sizes.items() if name not in next(iter(DIT_SIZES.values()))}
        return DiT.from_name(config.name, class_dropout_prob=label_dropout, **sizes)
    return DiT(class_dropout_prob=label_dropout, **sizes)


def train(config: configs.TrainConfig, resolved: str) -> None:
    """Train a patch, or all weights, on top of a model."""
    directory = Path(config.output_dir)
    model, scheduler = load_denoiser(config.model)
    dataset = load_dataset(config.data)
    method: Method = DMP(config.patch) if config.method == "dmp" else Finetune(scheduler)
    identity = {
        "model": config.model,
        "method": config.method,
        "patch": asdict(config.patch),
        "data": asdict(config.data),
    }
    write_text(directory / RUN_CONFIG, resolved)
    run_training(
        model,
        method,
        Objective(scheduler, learns_sigma(model)),
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
    )
    print(f"The result is in '{directory}'.")
