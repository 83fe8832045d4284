"""From a comparison's config to its jobs; everything that can be refused is refused before any starts."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stagepatch.checkpoints import build_denoiser
from stagepatch.core import UserError, as_json, as_user_error
from stagepatch.data import BUNDLED, cache_directory, fit_to_model
from stagepatch.diffusion import make_timesteps, make_weighting
from stagepatch.evaluation import METRICS
from stagepatch.families import with_density
from stagepatch.methods import open_artifact
from stagepatch.patch import with_condition
from stagepatch.sampling import SamplingConfig
from stagepatch.studies.compare_config import ITSELF, PARTS, CompareConfig, EntryConfig
from stagepatch.studies.compare_jobs import RUN_FIELDS, CompareJob
from stagepatch.training import BOOKKEEPING, DDOConfig, TrainConfig

# Of jobs that are older than these options.
_DEFAULTS = SimpleNamespace(
    **{"dtype": "float32", "schedule": "", "learned": "", "start_from": "", "objective": "denoising"},
    **{"held_out": "held_out", "second_extractor": "", "num_stages": 0, "after": ""},
)


def plan_jobs(config: CompareConfig) -> list[CompareJob]:
    """The jobs, entry by entry and seed by seed.

    Raises:
        UserError: no entries, two of one name, fewer than 3 sampling seeds, an unknown method or key, a method that
            the model cannot take, or a job's directory that holds another's result.
    """
    if not config.entries:
        raise UserError(
            "entries is empty: give at least one, such as {name: DMP, method: dmp}, or give hours, and rows are found."
        )
    repeated = [name for name, count in Counter(_slug(entry.name) for entry in config.entries).items() if count > 1]
    if repeated:
        raise UserError(f"Two entries are called '{repeated[0]}': give each a name of its own.")
    if len(config.sampling_seeds) < 3 or not config.training_seeds:
        raise UserError(
            f"sampling_seeds={config.sampling_seeds} must be at least 3, and training_seeds="
            f"{config.training_seeds} at least 1: differences are judged by their spread."
        )
    if config.second_extractor == config.extractor:
        raise UserError(f"second_extractor='{config.second_extractor}' is the extractor itself: choose another one.")
    if config.metric not in METRICS:
        raise UserError(f"metric='{config.metric}' is none of {', '.join(METRICS)}.")
    if config.metric == "fid_second" and not config.second_extractor:
        raise UserError("metric='fid_second' is in the features of second_extractor: give one.")
    if config.metric == "fid_held_out" and config.data.source not in BUNDLED and not config.data.held_out:
        raise UserError(
            f"No images of '{config.data.source}' are held out: hold some out, as by data.held_out=0.1, if the model "
            f"was not trained on them either, or set metric to fid_train."
        )
    if config.held_out == "tune" and config.data.source != "fashion":
        raise UserError(f"held_out='tune' is of 'fashion' alone, not of '{config.data.source}'.")
    config = replace(config, data=fit_to_model(config.data, config.model))
    if config.quick:
        config = _quick(config)
    jobs: list[CompareJob] = []
    for entry in config.entries:
        with as_user_error(f"Entry '{entry.name}'", UserError):
            own = _jobs_of(entry, config)
            if entry.after:
                _follow(own, entry.after, jobs)
            given = {(job.config.model, job.schedule, job.learned, job.config.start_from): job for job in own}
            for job in given.values():
                job.trainable_parameters()
        jobs += own
    _train_once(jobs, refuses_equal=not config.quick)
    ignored = set(BOOKKEEPING) - {"snapshot_every"}  # a snapshot is a checkpoint that is measured
    for job in jobs:
        job.check_directory(_DEFAULTS, ignored)
    return jobs


def _train_once(jobs: list[CompareJob], refuses_equal: bool) -> None:
    """Let rows that differ in sampling alone share a training; what has begun one of its own keeps it.

    Raises:
        UserError: two rows differ in nothing. In the quick form, where all train for as many steps, they may.
    """
    first: dict[str, CompareJob] = {}
    for job in jobs:
        if job.config.method != "none":
            identity, further = job.identity(), ("num_stages", "checkpoints", "after")
            own = {name: identity[name] for name in (*RUN_FIELDS, *job.config.learns_by(), *further)}
            trains = first.setdefault(json.dumps([as_json(own), job.config.ddo.fakes]), job)
            if refuses_equal and trains is not job and trains.sampling == job.sampling:
                raise UserError(
                    f"Entries '{trains.name}' and '{job.name}' train and sample alike: change one, or leave one out."
                )
            if trains is not job and not Path(job.config.output_dir).exists():
                job.trained_by, job.config.output_dir = trains, trains.config.output_dir


def _follow(own: list[CompareJob], name: str, above: list[CompareJob]) -> None:
    """Let an entry's jobs train on from those of an entry above.

    Raises:
        UserError: no entry above of that name, or what it learns cannot be trained on from.
    """
    found = {job.config.training.seed: job for job in above if job.name == name}
    if not found:
        names = ", ".join(f"'{each}'" for each in dict.fromkeys(job.name for job in above)) or "none"
        raise UserError(f"after='{name}' is no entry above this one: {names}.")
    if any(job.config.method == "none" or job.num_stages for job in found.values()):
        raise UserError(f"after='{name}' leaves no training to go on from: it trains nothing, or a range at a time.")
    for job in own:
        job.after = before = found[job.config.training.seed]
        for part in ("method", "model", "patch", "lora", "wavelet"):
            then, now = (as_json(getattr(each.config, part)) for each in (before, job))
            if then != now:
                raise UserError(f"after='{name}' needs the same {part} here as there: {then}, not {now}.")


def _quick(config: CompareConfig) -> CompareConfig:
    few = {"num_images": 500}
    entries = [
        replace(
            entry,
            training={k: v for k, v in entry.training.items() if k not in ("steps", "compile")},
            ddo={**entry.ddo, "sampling": {**entry.ddo.get("sampling", {}), **few}}
            if entry.objective != "denoising"
            else {},
        )
        for entry in config.entries
    ]
    return replace(
        config,
        training=replace(config.training, steps=max(1, config.training.steps // 40), warmup_steps=0, compile=False),
        sampling=replace(config.sampling, num_images=min(config.sampling.num_images, 100)),
        entries=entries,
        training_seeds=config.training_seeds[:1],
        evaluate_every=0,
        output_dir=f"{config.output_dir}-quick",
    )


def _jobs_of(entry: EntryConfig, config: CompareConfig) -> list[CompareJob]:
    parts: dict[str, dict[str, Any]] = {name: dict(getattr(entry, name)) for name in PARTS}
    training = replace(config.training, **parts.pop("training"), tensorboard=False)
    sampling = replace(config.sampling, **parts.pop("sampling"))
    if "sampling" in parts["ddo"]:
        parts["ddo"]["sampling"] = replace(DDOConfig().sampling, **parts["ddo"]["sampling"])
    own: dict[str, Any] = {name: PARTS[name](**values) for name, values in parts.items()}
    shape = build_denoiser(config.model)
    own["patch"] = with_condition(own["patch"], shape)
    own["timesteps"] = with_density(own["timesteps"], shape)
    if not own["ddo"].fakes and not (entry.model or entry.start_from or entry.after):
        own["ddo"].fakes = str(Path(config.output_dir) / _fakes_name(own["ddo"]))
    make_weighting(own["weighting"])
    make_timesteps(own["timesteps"], torch.linspace(0.0, 1.0, 1000))
    _check_entry(entry, config, sampling)
    is_trained = entry.method != "none"
    is_base = not is_trained and not (entry.model or entry.schedule or entry.learned or entry.sampling)
    is_one = not is_trained and "{seed}" not in entry.model + entry.schedule + entry.learned + sampling.guide
    every = config.evaluate_every or training.steps
    checkpoints = sorted({*range(every, training.steps + 1, every), training.steps})
    if not is_trained:
        checkpoints = [0] if is_base else [training.steps]
    training.snapshot_every = every if len(checkpoints) > 1 else 0
    jobs = []
    for seed in [0] if is_one else config.training_seeds:
        directory = Path(config.output_dir) / "jobs" / (_slug(entry.name) + ("" if is_one else f"-{seed}"))
        run = TrainConfig(
            method=entry.method,
            output_dir=str(directory / "learned"),
            model=(entry.model or config.model).replace("{seed}", str(seed)),
            dtype=config.dtype,
            start_from=entry.start_from.replace("{seed}", str(seed)),
            objective=entry.objective,
            cache=str(cache_directory(config.cache, config.output_dir)),
            cache_batch_size=config.cache_batch_size,
            data=config.data,
            training=replace(training, seed=seed),
            **own,
        )
        sampled = replace(sampling, guide=sampling.guide.replace("{seed}", str(seed)))
        if sampled.guide not in ("", ITSELF):
            open_artifact(sampled.guide)
        measuring = (sampled, config.sampling_seeds, config.extractor, checkpoints)
        schedule, learned = (each.replace("{seed}", str(seed)) for each in (entry.schedule, entry.learned))
        further = (config.held_out, config.second_extractor, entry.control, entry.num_stages)
        jobs.append(CompareJob(directory, run, entry.name, *measuring, schedule, learned, is_base, *further))
    return jobs


def _check_entry(entry: EntryConfig, config: CompareConfig, sampling: SamplingConfig) -> None:
    """Refuse what does not go together.

    Raises:
        UserError: it does not.
    """
    is_trained = entry.method != "none"
    if {"num_images", "seed"} & set(entry.sampling):
        raise UserError("sampling.num_images and sampling.seed are the same for all entries.")
    if (entry.schedule or entry.learned) and is_trained:
        raise UserError(f"schedule and learned are sampled as they are: set method='{entry.method}' to none.")
    if entry.num_stages and not (is_trained and entry.num_stages > 1):
        raise UserError(
            f"num_stages={entry.num_stages} are ranges, each trained apart: give 2 or more, and a method, or none."
        )
    if entry.num_stages and (entry.start_from or entry.after or entry.timesteps or config.evaluate_every):
        raise UserError("num_stages goes without start_from, after, timesteps and evaluate_every: leave them out.")
    if entry.start_from and entry.after:
        raise UserError("start_from and after both say what is trained on from: leave one out.")
    if entry.ddo and entry.objective == "denoising":
        raise UserError("ddo is of objectives 'ddo' and 'samples': set one, or leave ddo out.")
    if not is_trained and (entry.objective != "denoising" or entry.start_from or entry.after):
        raise UserError("method='none' trains nothing: leave out objective, start_from and after.")
    if sampling.guide == ITSELF and (entry.num_stages or not is_trained):
        raise UserError(f"sampling.guide='{ITSELF}' is what an entry learns in one training: give it a method alone.")


def _fakes_name(config: DDOConfig) -> str:
    """A directory for each way of sampling them."""
    if config.sampling == DDOConfig().sampling:
        return "fakes"
    return "fakes-" + hashlib.sha256(str(as_json(vars(config.sampling))).encode()).hexdigest()[:8]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
