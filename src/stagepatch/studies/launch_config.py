"""Where jobs run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
