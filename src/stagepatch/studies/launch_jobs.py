"""Jobs through submitit: here, or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stagepatch.core import UserError, check_numbers

if TYPE_CHECKING:
    from stagepatch.studies.job import Job


@dataclass
class LaunchConfig:
    """Where jobs run, each in a process of its own, through submitit.

    Args:
        executor: 'local', this machine; 'slurm', a cluster; 'debug', one after the other in this process.
        workers: jobs at a time; they share the machine's cores.
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

    def submit_and_wait(job: Job) -> None:
        submitted = executor.submit(_run_in_process, job, config.tasks, config.threads)
        try:
            submitted.results()
        except Exception as error:  # whatever the job raised, and submitit's own for a job that died
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise UserError(f"{' '.join(last)} (log: '{submitted.paths.stderr}')") from error

    # submitit starts and watches the processes; the threads only hold back more than `workers` of them.
    with ThreadPoolExecutor(config.workers) as pool:
        waiting = {pool.submit(_error_of, submit_and_wait, job): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _error_of(run: Callable[..., None], *arguments: Any) -> UserError | None:
    try:
        run(*arguments)
    except UserError as error:
        return error
    return None


def _run_in_process(job: Job, tasks: int, threads: int) -> None:
    """In the job's own process, or one of them."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if tasks > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export()
    job.run()
