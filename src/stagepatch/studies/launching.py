"""Jobs through submitit: here, or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from stagepatch.core.errors import UserError
from stagepatch.studies.launch_config import LaunchConfig

T = TypeVar("T")


def launch(
    run: Callable[[T], None], jobs: Sequence[T], config: LaunchConfig, logs: Path, on_done: Callable[[T], None]
) -> None:
    """Run jobs, so many at a time, and wait for them.

    Args:
        run: does a job, in a process of its own; it and the jobs can be pickled.
        jobs: their `str` names them in messages.
        logs: directory of the jobs' own output.
        on_done: called after each that succeeded.

    Raises:
        UserError: a job failed; the others were finished first, and its log is named.
    """
    if config.workers < 1:
        raise UserError(f"launch.workers={config.workers} must be at least 1.")
    failed: list[tuple[T, UserError]] = []
    for job, error in _results(run, jobs, config, logs):
        if error is None:
            on_done(job)
        else:
            failed.append((job, error))
    if failed:
        names = ", ".join(str(job) for job, _ in failed)
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed: {names}. The first says: {failed[0][1]} Give the same command "
            f"again to go on with what is left."
        )


def _results(
    run: Callable[[T], None], jobs: Sequence[T], config: LaunchConfig, logs: Path
) -> Iterator[tuple[T, UserError | None]]:
    """Each job as it ends, with what went wrong."""
    if config.executor == "debug":
        for job in jobs:
            yield job, _error_of(lambda job=job: run(job))  # type: ignore[misc]
        return
    executor = _executor(config, logs)

    def submit_and_wait(job: T) -> None:
        _wait(executor.submit(_run_in_process, run, job, _tasks(config), _threads(config)))

    # submitit starts and watches the processes; the threads only hold back more than `workers` of them.
    with ThreadPoolExecutor(config.workers) as pool:
        waiting = {pool.submit(_error_of, lambda job=job: submit_and_wait(job)): job for job in jobs}  # type: ignore[misc]
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _error_of(run: Callable[[], None]) -> UserError | None:
    try:
        run()
    except UserError as error:
        return error
    return None


def _wait(submitted: Any) -> None:
    try:
        submitted.results()
    except Exception as error:  # whatever the job raised, and submitit's own for a job that died
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        log = getattr(getattr(submitted, "paths", None), "stderr", "its log")
        raise UserError(f"{' '.join(last)} (log: '{log}')") from error


def _executor(config: LaunchConfig, logs: Path) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError("Running jobs needs submitit: pip install submitit.") from error
    logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster=config.executor)
    tasks = _tasks(config)
    executor.update_parameters(timeout_min=config.minutes, tasks_per_node=tasks, gpus_per_node=config.gpus)
    if config.executor == "slurm":
        executor.update_parameters(
            cpus_per_task=4, **({"slurm_partition": config.partition} if config.partition else {})
        )
    return executor


def _tasks(config: LaunchConfig) -> int:
    return max(1, config.processes, config.gpus)


def _threads(config: LaunchConfig) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (config.workers * _tasks(config))) if config.executor == "local" else 0


def _run_in_process(run: Callable[[T], None], job: T, tasks: int, threads: int) -> None:
    """In the job's own process, or one of them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export()
    run(job)
