"""Ctrl-C, and a signal to the command alone, while jobs run in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.studies.conftest import write_config

STUDY = {
    "entries": [{"name": "DMP", "method": "dmp"}, {"name": "bias", "method": "bitfit"}],
    "training": {"steps": 1_000_000, "batch_size": 8, "log_every": 1, "checkpoint_every": 1_000_000},
    "launch": {"executor": "local", "workers": 1},
}


@pytest.mark.parametrize(("send", "signum"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_the_job_that_runs_writes_its_checkpoint_and_no_other_begins(tmp_path, send, signum):
    config = write_config(tmp_path, **STUDY)
    command = [sys.executable, "-m", "stagepatch", "compare", f"--config={config}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    learned = tmp_path / "out" / "jobs" / "dmp-0" / "learned"
    try:
        deadline = time.time() + 120
        while not (learned / "log.jsonl").exists() and time.time() < deadline:
            time.sleep(0.05)
        send(process.pid, signum)
        said = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signum
    assert "Stopped; 2 of 2 jobs are left. Give the same command again" in said
    assert (learned / "checkpoint.safetensors").exists()
    [log] = [path.read_text() for path in (tmp_path / "out" / "logs").glob("*/*.err")]
    assert "Stopped at iteration" in log
    assert not (tmp_path / "out" / "jobs" / "bias-0").exists()
