"""What most rooms' tests start from."""

import os
from pathlib import Path

# Before torch is imported: workers of pytest-xdist share the cores, and what is compared bit for bit is the CPU's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import gc

import pytest
import torch

from stagepatch.training import loop
from tests.hub import hub as hub
from tests.runs import Processes, make_model

SLOW = Path(__file__).with_name("slow.txt")

os.fsync = lambda descriptor: None  # no test cuts the power, and each flush waits for the disk


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests of tests/slow.txt too")


def pytest_collection_modifyitems(config, items):
    slow = tuple(line for line in SLOW.read_text().splitlines() if not line.startswith("#"))
    named = any("::" in argument for argument in config.args)  # who names a test wants it
    if config.getoption("--all"):
        gone = [line for line in slow if not any(item.nodeid.startswith(line) for item in items)]
        if gone and "tests" in config.args:
            raise pytest.UsageError(f"tests/slow.txt names what is not there: {gone}")
    elif not named:
        left_out = [item for item in items if item.nodeid.startswith(slow)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.nodeid.startswith(slow)]
    measured = set()
    for item in items:
        # Tracing takes two fifths more time, and a test's other parameters hardly reach another line.
        name = item.nodeid.split("[")[0]
        if name in measured:
            item.add_marker(pytest.mark.no_cover)
        measured.add(name)
        if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


def pytest_collection_finish():
    """Half a million objects of imported libraries are not looked through again at every collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 20)


class Shown:
    """Collects what tests that passed have shown of which models, for `tests.models_table`."""

    def __init__(self, config):
        self.config, self.seen = config, set()

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when == "call":
            self.seen |= {value for key, value in report.user_properties if key == "shows"}

    def pytest_sessionfinish(self):
        self.config.cache.set("models/shown", sorted(self.seen))


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that hears of every worker's tests
        config.pluginmanager.register(Shown(config))


@pytest.fixture
def shows(record_property):
    """Say what the test has shown, once it has: `shows("training", "UNet2DModel")`."""
    return lambda what, name: record_property("shows", f"{what}: {name}")


@pytest.fixture
def tiny_dit():
    """A factory of frozen DiTs in eval mode, with every weight drawn."""

    def make(seed=0, **overrides):
        return make_model(seed, 0.1, **{"hidden_size": 32, "num_layers": 3, **overrides}).requires_grad_(False)

    return make


@pytest.fixture
def batch():
    """Sample [4, 1, 8, 8], timesteps [4] and labels [4] (the last is the null label) for `tiny_dit`."""
    sample = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return sample, torch.tensor([1, 250, 600, 999]), torch.tensor([0, 3, 9, 10])


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """Every extractor's features are mean pixels, of images of whatever size; the batches that they were of."""
    seen = []

    class Pixels:
        name = fingerprint = "mean pixels"

        def __call__(self, images):
            seen.append(images)
            return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    for place in ("evaluation.evaluator", "cli.evaluate_sources"):
        monkeypatch.setattr(f"stagepatch.{place}.load_extractor", lambda name: Pixels())
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path / "features"))
    return seen


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Starts jobs in processes of their own."""
    jobs = Processes(tmp_path_factory.mktemp("output"))
    yield jobs
    jobs.stop()


@pytest.fixture
def seen(monkeypatch):
    """What every iteration drew."""
    seen, backward = [], loop.backward

    def noted(step, draws, *rest):
        seen.append(draws)
        return backward(step, draws, *rest)

    monkeypatch.setattr(loop, "backward", noted)
    return seen
