"""From a comparison's config to its jobs; everything that can be refused is refused here."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from stagepatch.checkpoints import build_denoiser
from stagepatch.checkpoints.loading import load_scheduler
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json
from stagepatch.core.settings import check_unchanged
from stagepatch.data.config import DataConfig
from stagepatch.diffusion import WeightingConfig, make_weighting
from stagepatch.evaluation import metric_names
from stagepatch.methods import LoRAConfig, Method, make_method
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig
from stagepatch.sampling.experts_file import read_schedule
from stagepatch.studies.compare_config import CompareConfig, EntryConfig
from stagepatch.training import BOOKKEEPING, TrainingConfig

JOB_NAME = "job.json"


@dataclass
class Job:
    """One entry, trained with one seed, and measured at its checkpoints.

    Args:
        directory: its own.
        cache: of a model with a VAE.
        checkpoints: steps after which it is measured.
        schedule: file of experts by timestep, sampled in place of the model alone.
        is_base: the comparison's own model, untrained, which the others are compared with.
    """

    directory: Path
    cache: Path
    model: str
    name: str
    method: str
    patch: PatchConfig
    lora: LoRAConfig
    weighting: WeightingConfig
    data: DataConfig
    training: TrainingConfig
    sampling: SamplingConfig
    sampling_seeds: list[int]
    extractor: str
    checkpoints: list[int]
    schedule: str = ""
    is_base: bool = False

    def __str__(self) -> str:
        return f"'{self.name}' (seed {self.training.seed})"

    def make_method(self) -> Method:
        """The method, yet to be trained."""
        facts = {"base model": self.model, "data": self.data.source, "steps": str(self.training.steps)}
        return make_method(self.method, self.patch, self.lora, facts)

    def identity(self) -> dict[str, Any]:
        """All that decides its result."""
        return {name: value for name, value in vars(self).items() if name not in ("directory", "cache", "is_base")}


def plan_jobs(config: CompareConfig) -> list[Job]:
    """The jobs, entry by entry and seed by seed.

    Raises:
        UserError: no entries, two of one name, fewer than 3 sampling seeds, an unknown method or key, a method that
            the model cannot take, or a job's directory that holds another's result.
    """
    if config.quick:
        config = _quick(config)
    if not config.entries:
        raise UserError("entries is empty: give at least one, such as {name: DMP, method: dmp}.")
    repeated = [name for name, count in Counter(_slug(entry.name) for entry in config.entries).items() if count > 1]
    if repeated:
        raise UserError(f"Two entries are called '{repeated[0]}': give each a name of its own.")
    if len(config.sampling_seeds) < 3 or not config.training_seeds:
        raise UserError(
            f"sampling_seeds={config.sampling_seeds} must be at least 3, and training_seeds="
            f"{config.training_seeds} at least 1: differences are judged by their spread."
        )
    names = metric_names("").keys()
    if config.metric not in names:
        raise UserError(f"metric='{config.metric}' is none of {', '.join(names)}.")
    if config.launch.workers < 1:
        raise UserError(f"launch.workers={config.launch.workers} must be at least 1.")
    jobs = [job for entry in config.entries for job in _jobs_of(entry, config)]
    for job in {(job.name, job.model, job.schedule): job for job in jobs}.values():
        _check_model_takes(job)
    for job in jobs:
        _check_directory(job)
    return jobs


def trainable_parameters(job: Job) -> tuple[int, int]:
    """Numbers that a job trains, and numbers of the model; counted without allocating any."""
    model = build_denoiser(job.model)
    total = sum(parameter.numel() for parameter in model.parameters())
    return _count(job.make_method().prepare(model)), total


def _count(groups: list[dict[str, Any]]) -> int:
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def _quick(config: CompareConfig) -> CompareConfig:
    training = replace(config.training, steps=max(1, config.training.steps // 40), warmup_steps=0)
    sampling = replace(config.sampling, num_images=min(config.sampling.num_images, 200))
    entries = [
        replace(entry, training={k: v for k, v in entry.training.items() if k != "steps"}) for entry in config.entries
    ]
    return replace(
        config,
        training=training,
        sampling=sampling,
        entries=entries,
        training_seeds=config.training_seeds[:1],
        evaluate_every=0,
        output_dir=f"{config.output_dir}-quick",
    )


def _jobs_of(entry: EntryConfig, config: CompareConfig) -> list[Job]:
    where = f"Entry '{entry.name}'"
    training = replace(config.training, **_known(entry.training, TrainingConfig, f"{where}, training"))
    patch = PatchConfig(**_known(entry.patch, PatchConfig, f"{where}, patch"))
    lora = LoRAConfig(**_known(entry.lora, LoRAConfig, f"{where}, lora"))
    weighting = WeightingConfig(**_known(entry.weighting, WeightingConfig, f"{where}, weighting"))
    make_weighting(weighting)
    every = config.evaluate_every or training.steps
    checkpoints = sorted({*range(every, training.steps + 1, every), training.steps})
    if entry.schedule and entry.method != "none":
        raise UserError(f"{where}: a schedule is sampled as it is: set method='{entry.method}' to none.")
    is_base = entry.method == "none" and not (entry.model or entry.schedule)
    is_one = entry.method == "none" and "{seed}" not in entry.model + entry.schedule
    jobs = []
    for seed in [0] if is_one else config.training_seeds:
        directory = Path(config.output_dir) / "jobs" / (_slug(entry.name) + ("" if is_one else f"-{seed}"))
        snapshots = 0 if entry.method == "none" or checkpoints == [training.steps] else every
        jobs.append(
            Job(
                directory,
                Path(config.cache or Path(config.output_dir) / "cache"),
                (entry.model or config.model).replace("{seed}", str(seed)),
                entry.name,
                entry.method,
                patch,
                lora,
                weighting,
                config.data,
                replace(training, seed=seed, snapshot_every=snapshots, tensorboard=False),
                config.sampling,
                config.sampling_seeds,
                config.extractor,
                [0] if is_base else [training.steps] if entry.method == "none" else checkpoints,
                entry.schedule.replace("{seed}", str(seed)),
                is_base,
            )
        )
    return jobs


def _known(values: dict[str, Any], config_class: type, where: str) -> dict[str, Any]:
    names = {field.name for field in fields(config_class)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise UserError(f"{where}: no key '{unknown[0]}'. Keys: {', '.join(sorted(names))}.")
    return values


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _check_model_takes(job: Job) -> None:
    """Prepare the method on the meta device: it says itself what it cannot take."""
    try:
        model: nn.Module = build_denoiser(job.model)
        job.make_method().prepare(model)
        if job.schedule:
            read_schedule(Path(job.schedule), load_scheduler(job.model).config.num_train_timesteps)
    except UserError as error:
        raise UserError(f"Entry '{job.name}': {error}") from error


def _check_directory(job: Job) -> None:
    path = job.directory / JOB_NAME
    if not path.exists():
        return
    ignored = set(BOOKKEEPING) - {"snapshot_every"}  # a snapshot is a checkpoint that is measured
    found = f"'{job.directory}' holds a job of another config"
    way_out = "Give another output_dir, or delete that directory."
    check_unchanged(read_json(path), job.identity(), found, way_out, Job, ignored)
