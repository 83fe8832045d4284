"""Jobs through submitit: here, or on a cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stagepatch.core import Interrupted, UserError, check_numbers
from stagepatch.training.signals import StopSignals

if TYPE_CHECKING:
    from stagepatch.studies.job import Job

_POLL_SECONDS = 0.1


@dataclass
class LaunchConfig:
    """Where jobs run, each in a process of its own, through submitit.

    Args:
        executor: 'local', this machine; 'slurm', a cluster; 'debug', one after the other in this process.
        workers: jobs at a time; they share the machine's cores, each with at most OMP_NUM_THREADS threads.
        processes: of a job, which share its batches; on a machine with GPUs one to each.
        gpus: of a job; at least as many processes are started.
        partition: of a cluster.
        minutes: time limit of a job on a cluster.
    """

    executor: Literal["local", "slurm", "debug"] = "local"
    workers: int = 2
    processes: int = 1
    gpus: int = 0
    partition: str = ""
    minutes: int = 1440

    def __post_init__(self) -> None:
        check_numbers(self, "launch.", workers=1, processes=1, gpus=0, minutes=1)

    @property
    def tasks(self) -> int:
        """Processes of a job."""
        return max(1, self.processes, self.gpus)

    @property
    def threads(self) -> int:
        """Of each process; 0 leaves it to torch."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // (self.workers * self.tasks)) if self.executor == "local" else 0


def launch(jobs: Sequence[Job], config: LaunchConfig, logs: Path, noun: str = "jobs") -> None:
    """Run those of some jobs that are not done, so many at a time, with a bar over all, and wait for them.

    Args:
        logs: directory of the jobs' own output.
        noun: what they are called in messages.

    Raises:
        UserError: a job failed; the others were finished first, and its log is named.
        Interrupted: SIGINT or SIGTERM came; the jobs that ran were stopped, a training with its checkpoint.
    """
    import torch

    from stagepatch.checkpoints import has_vae
    from stagepatch.core.progress import progress_bar
    from stagepatch.data import cache_directory, make_cache

    left = [job for job in jobs if not job.is_done()]
    print(f"{len(jobs)} {noun}, {len(jobs) - len(left)} of them done; logs in '{logs}'.")
    shared = [job.config for job in left if has_vae(job.config.model)]
    if shared:  # one cache for all, made before they start
        first = shared[0]
        directory, dtype = cache_directory(first.cache, ""), getattr(torch, first.dtype)
        make_cache(directory, first.model, first.data, first.cache_batch_size, text_dtype=dtype)
    failed: list[tuple[Job, UserError]] = []
    with progress_bar() as progress:
        task = progress.add_task(noun, total=len(jobs), completed=len(jobs) - len(left), status="")
        for job, error in _results(left, config, logs):
            if error is not None:
                failed.append((job, error))
                continue
            progress.advance(task)
            progress.console.print(f"done: {job}", highlight=False)
    if failed:
        names = ", ".join(str(job) for job, _ in failed)
        raise UserError(
            f"{len(failed)} of {len(left)} jobs failed: {names}. The first says: {failed[0][1]} Give the same command "
            f"again to go on with what is left."
        )


def _results(jobs: Sequence[Job], config: LaunchConfig, logs: Path) -> Iterator[tuple[Job, UserError | None]]:
    """Each job as it ends, with what went wrong."""
    if config.executor == "debug":
        for job in jobs:
            yield job, _error_of(job.run)
        return
    import submitit

    logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=logs / "%j", cluster=config.executor)
    executor.update_parameters(
        timeout_min=config.minutes,
        tasks_per_node=config.tasks,
        gpus_per_node=config.gpus,
        slurm_cpus_per_task=4,
        **({"slurm_partition": config.partition} if config.partition else {}),
    )

    yield from _in_processes(executor, jobs, config)


def _in_processes(executor: Any, jobs: Sequence[Job], config: LaunchConfig) -> Iterator[tuple[Job, UserError | None]]:
    waiting = list(jobs)
    running: dict[Any, Job] = {}
    with StopSignals() as signals:
        try:
            while waiting or running:
                if signals.received:
                    print("Stopping: a job that trains writes its checkpoint. Ctrl-C again does not wait.")
                    raise Interrupted(
                        signals.received,
                        f"Stopped; {len(waiting) + len(running)} of {len(jobs)} jobs are left. Give the same command "
                        "again to go on with them.",
                    )
                while waiting and len(running) < config.workers:
                    job = waiting.pop(0)
                    running[_submit(executor, job, config)] = job
                for submitted in [submitted for submitted in running if submitted.done()]:
                    yield running.pop(submitted), _error_of(_wait_for, submitted)
                time.sleep(_POLL_SECONDS)
        finally:
            for submitted in running:
                _stop(submitted, config)
            for submitted in running:
                submitted.wait()


def _submit(executor: Any, job: Job, config: LaunchConfig) -> Any:
    """Ctrl-C in a terminal goes to every process in the foreground: it is kept from submitit's own, which would kill
    the job after a second; `_stop` tells it.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_run_in_process, job, config)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _stop(submitted: Any, config: LaunchConfig) -> None:
    """With SIGTERM, at which a training writes its checkpoint."""
    if config.executor != "local":
        submitted.cancel()
    elif not submitted.done():
        os.kill(int(submitted.job_id), signal.SIGTERM)  # submitit's process, which passes it on


def _wait_for(submitted: Any) -> None:
    try:
        submitted.results()
    except Exception as error:  # whatever the job raised, and submitit's own for a job that died
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        raise UserError(f"{' '.join(last)} (log: '{submitted.paths.stderr}')") from error


def _error_of(run: Callable[..., None], *arguments: Any) -> UserError | None:
    try:
        run(*arguments)
    except UserError as error:
        return error
    return None


def _run_in_process(job: Job, config: LaunchConfig) -> None:
    """In the job's own process, or one of them."""
    import torch

    if config.executor == "local":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit's handler lets it pass
    if config.threads:
        torch.set_num_threads(min(config.threads, torch.get_num_threads()))  # OMP_NUM_THREADS may ask for fewer
    if config.tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export()
    job.run()
