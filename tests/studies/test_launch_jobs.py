"""How many of the machine's cores a job takes."""

import signal
from types import SimpleNamespace

import pytest
import torch

from stagepatch.studies import launch_jobs
from stagepatch.studies.launch_jobs import LaunchConfig


@pytest.mark.parametrize(("asked_for", "workers", "taken"), [(1, 1, 1), (8, 1, 8), (8, 4, 2), (3, 2, 3)])
def test_jobs_share_the_cores_and_take_no_more_threads_than_torch_was_given(monkeypatch, asked_for, workers, taken):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(launch_jobs.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(asked_for)  # as torch does by OMP_NUM_THREADS
        job = SimpleNamespace(run=lambda: seen.append(torch.get_num_threads()))
        launch_jobs._run_in_process(job, LaunchConfig(workers=workers))
    finally:
        torch.set_num_threads(before)
    assert seen == [taken]
