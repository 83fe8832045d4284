import os

import pytest

# What these tests compare bit for bit is the CPU's.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    from training_runs import Processes

    jobs = Processes(tmp_path_factory.mktemp("output"))
    yield jobs
    jobs.stop()
