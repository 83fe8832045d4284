"""Train a patch, or another method, on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from stagepatch.checkpoints import has_vae, load_denoiser
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, say
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_text
from stagepatch.data import CachedLatents, load_dataset, make_cache
from stagepatch.diffusion import Objective, make_weighting
from stagepatch.families import learns_sigma
from stagepatch.methods import make_method
from stagepatch.training import train as run_training


def train(config: configs.TrainConfig, resolved: str) -> None:
    """Train a patch, or all weights, on top of a model."""
    directory = Path(config.output_dir)
    facts = {"base model": config.model, "data": config.data.source, "steps": str(config.training.steps)}
    facts |= {name: str(getattr(config.training, name)) for name in ("batch_size", "learning_rate", "seed")}
    method = make_method(config.method, config.patch, config.lora, facts)
    weighting = make_weighting(config.weighting)
    dataset: Dataset[dict[str, Any]]
    if has_vae(config.model):
        cache_dir = Path(config.cache or directory / "cache")
        make_cache(cache_dir, config.model, config.data, config.cache_batch_size, torch.float32)
        dataset = CachedLatents(cache_dir)
    else:
        dataset = load_dataset(config.data)
    model, scheduler = load_denoiser(config.model)
    if config.dtype != "float32" and config.method in ("finetune", "bitfit"):
        raise UserError(
            f"method='{config.method}' trains the model's own weights, which dtype='{config.dtype}' spoils."
        )
    model.to(getattr(torch, config.dtype))
    identity = {
        "model": config.model,
        "method": config.method,
        "dtype": config.dtype,
        "patch": config.patch,
        "lora": config.lora,
        "weighting": config.weighting,
        "data": config.data,
    }
    run_training(
        model,
        method,
        Objective(scheduler, learns_sigma(model), weighting),
        dataset,
        config.training,
        directory,
        identity,
        config.data.horizontal_flip,
        config.data.num_workers,
        on_start=lambda: write_text(directory / RUN_CONFIG, resolved),
    )
    say(f"The result is in '{directory}'.")
