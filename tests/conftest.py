"""What most rooms' tests start from."""

import os

import pytest
import torch

from stagepatch.models import DiT
from tests.runs import Processes

# What tests compare bit for bit is the CPU's.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 2,
    "num_classes": 10,
}


def pytest_collection_modifyitems(items):
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def tiny_dit():
    """A factory of frozen DiTs in eval mode; every weight is drawn, since adaLN-Zero's zeros would hide the blocks."""

    def make(seed=0, **overrides):
        model = DiT(**{**TINY, **overrides}).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
        return model

    return make


@pytest.fixture
def batch():
    """Sample [4, 1, 8, 8], timesteps [4] and labels [4] (the last is the null label) for `tiny_dit`."""
    sample = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return sample, torch.tensor([1, 250, 600, 999]), torch.tensor([0, 3, 9, 10])


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Starts jobs in processes of their own."""
    jobs = Processes(tmp_path_factory.mktemp("output"))
    yield jobs
    jobs.stop()
