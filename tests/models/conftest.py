"""Models small enough to build in milliseconds, with weights that let every path show."""

import pytest
import torch

from stagepatch.models import DiT

SMALL = {"sample_size": 8, "in_channels": 3, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_classes": 10, "pooled_projection_dim": 6}


def randomize(model, seed=0, std=0.2):
    """Every parameter drawn anew: what adaLN-Zero sets to zero would hide the blocks from a test."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return model


@pytest.fixture
def make_dit():
    def make(seed=0, **overrides):
        return randomize(DiT(**{**SMALL, **overrides}), seed).eval()

    return make


@pytest.fixture
def model(make_dit):
    return make_dit()
