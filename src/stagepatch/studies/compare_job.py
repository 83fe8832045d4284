"""One job: train, measure every checkpoint, write down what it took."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from stagepatch.checkpoints import has_vae, load_denoiser
from stagepatch.core.files import read_json, write_json, write_tensors
from stagepatch.core.processes import processes
from stagepatch.core.settings import as_json
from stagepatch.data import CachedLatents, load_dataset
from stagepatch.diffusion import Objective, make_weighting
from stagepatch.evaluation import latent_sampling, load_extractor, load_references, measure
from stagepatch.families import learns_sigma
from stagepatch.methods import load_learned
from stagepatch.sampling import load_experts
from stagepatch.studies.compare_plan import JOB_NAME, Job
from stagepatch.training import read_log, train

METRICS_NAME, COST_NAME, SAMPLES_NAME = "metrics.json", "cost.json", "samples.safetensors"


def is_done(job: Job) -> bool:
    """Whether nothing is left to do."""
    return set(measured_checkpoints(job)) >= set(job.checkpoints)


def measured_checkpoints(job: Job) -> dict[int, list[dict[str, float]]]:
    """Metrics of every sampling seed by checkpoint, as far as they are measured."""
    path = job.directory / METRICS_NAME
    return {int(step): metrics for step, metrics in read_json(path).items()} if path.exists() else {}


def run_job(job: Job) -> None:
    """Do what is left of a job. A process of an earlier start that still works on it is waited for."""
    job.directory.mkdir(parents=True, exist_ok=True)
    is_main = processes().is_main_process
    with FileLock(job.directory / "lock") if is_main else contextlib.nullcontext():
        if is_main:
            write_json(job.directory / JOB_NAME, as_json(job.identity()))
        processes().wait_for_everyone()
        _run(job, is_main)


def _run(job: Job, is_main: bool) -> None:
    learned = job.directory / "learned"
    if job.method != "none" and not (job.directory / COST_NAME).exists():
        _train(job, learned)
    done = measured_checkpoints(job)
    for step in job.checkpoints:
        if step in done:
            continue
        model, scheduler = load_denoiser(job.model)
        model.to(processes().device)
        if job.method != "none":
            last = step == job.training.steps
            load_learned(model, learned if last else learned / "snapshots" / f"{step:07d}")
        sampling = job.sampling
        if job.schedule:
            experts = load_experts(job.schedule, model, scheduler)
            experts.attach(model)
            sampling = experts.sampling(sampling)
        references, extractor = load_references(job.data), load_extractor(job.extractor)
        latents = latent_sampling(job.model, job.data, job.cache)
        measured = measure(model, scheduler, sampling, job.sampling_seeds, references, extractor, latents=latents)
        done[step] = measured.metrics
        if is_main:
            write_tensors(job.directory / SAMPLES_NAME, {"images": measured.images[:100]})
            write_json(job.directory / METRICS_NAME, {str(key): value for key, value in sorted(done.items())})


def _train(job: Job, learned: Path) -> None:
    model, scheduler = load_denoiser(job.model)
    method = job.make_method()
    objective = Objective(scheduler, learns_sigma(model), make_weighting(job.weighting))
    dataset: Any = CachedLatents(job.cache) if has_vae(job.model) else load_dataset(job.data)
    flips = job.data.horizontal_flip
    workers = job.data.num_workers
    train(model, method, objective, dataset, job.training, learned, job.identity(), flips, workers, progress=False)
    if processes().is_main_process:
        write_json(job.directory / COST_NAME, _cost(job, learned))


def _cost(job: Job, learned: Path) -> dict[str, Any]:
    """Seconds a step, peak memory [bytes] and size of what was learned [bytes]."""
    speeds = [record["images_per_second"] for record in read_log(learned)]
    kept = [path for path in learned.iterdir() if path.suffix == ".safetensors" and "checkpoint" not in path.name]
    return {
        "seconds_per_step": job.training.batch_size / statistics.median(speeds),
        "peak_memory": _peak_memory(),
        "file_size": sum(path.stat().st_size for path in kept),
    }


def _peak_memory() -> int:
    """Of the accelerator, or of the process, its imports included."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
