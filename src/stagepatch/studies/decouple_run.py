"""Train a stage."""

from __future__ import annotations

import contextlib
from typing import Any

from filelock import FileLock

from stagepatch.checkpoints import add_projections, fold_projections, has_vae, load_denoiser
from stagepatch.checkpoints.fingerprint import model_fingerprint
from stagepatch.checkpoints.loading import find_model
from stagepatch.core.files import write_json
from stagepatch.core.processes import processes
from stagepatch.core.settings import as_json
from stagepatch.data import CachedLatents, load_dataset
from stagepatch.diffusion import Objective, make_weighting
from stagepatch.diffusion.timesteps import TimestepSampler
from stagepatch.families import learns_sigma
from stagepatch.methods import Consistent, Method, Pretrain, make_method
from stagepatch.studies.decouple_plan import STAGE_NAME, Stage
from stagepatch.training import train


def is_done(stage: Stage) -> bool:
    """Whether nothing is left to do."""
    return (stage.directory / STAGE_NAME).exists()


def run_stage(stage: Stage) -> None:
    """Train a stage, or what is left of it. A process of an earlier start that still works on it is waited for."""
    stage.directory.mkdir(parents=True, exist_ok=True)
    is_main = processes().is_main_process
    with FileLock(stage.directory / "lock") if is_main else contextlib.nullcontext():
        processes().wait_for_everyone()
        if not is_done(stage):
            _train(stage, progress=stage.config.stage >= 0)
            if is_main:
                write_json(stage.directory / STAGE_NAME, _facts(stage))


def _train(stage: Stage, progress: bool) -> None:
    config = stage.config
    model, scheduler = load_denoiser(config.model)
    if config.projection:
        add_projections(model)
    method: Method
    method = (
        Pretrain(scheduler) if config.method == "finetune" else make_method(config.method, config.patch, config.lora)
    )
    weighting, sigma = make_weighting(config.weighting), learns_sigma(model)
    total = Objective(scheduler, sigma).num_train_timesteps
    sampler = TimestepSampler(total, stage.first, stage.stop, config.p, bool(config.antithetic))
    dataset: Any = CachedLatents(stage.cache) if has_vae(config.model) else load_dataset(config.data)
    train(
        model,
        Consistent(method, config.consistency) if config.consistency else method,
        Objective(scheduler, sigma, weighting, sampler),
        dataset,
        config.training,
        stage.directory,
        stage.identity(),
        config.data.horizontal_flip,
        config.data.num_workers,
        progress=progress,
    )
    if config.projection and processes().is_main_process:
        fold_projections(model)
        method.save(stage.directory)


def _facts(stage: Stage) -> dict[str, Any]:
    """What merging and schedules need to know of a stage."""
    base = {"source": stage.config.model, "fingerprint": model_fingerprint(find_model(stage.config.model))}
    return {"number": stage.number, "from": stage.first, "to": stage.stop, "base": base, **as_json(stage.identity())}
