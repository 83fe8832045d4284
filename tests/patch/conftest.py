import pytest
import torch

from stagepatch.families import predict
from stagepatch.patch import Patch, PatchConfig

# One of every kind of patch.
VARIANTS = [
    {},
    {"preset": "released"},
    {"num_experts": 2, "condition": "t+c"},
    {"position": "prepend", "num_prompts": 3},
    {"position": "prepend", "num_prompts": 3, "prepending": "plain"},
    {"gate": "attention"},
    {"gate": "learned_keys", "selection": "hard", "top_k": 5},
    {"gate": "none"},
]


@pytest.fixture
def model(tiny_dit):
    """A tiny DiT."""
    return tiny_dit()


@pytest.fixture
def base(model, batch):
    """What the model says of the batch before a patch comes."""
    return predict(model, *batch)


@pytest.fixture
def patched(model, batch):
    """Gives what a patched model says of the batch; the gate's answer stays in `patch.last`."""

    def call(patch, on=model, inputs=batch):
        with patch.attach(on):
            return predict(on, *inputs)

    return call


@pytest.fixture
def make_patch():
    """A factory of patches in eval mode whose every weight is drawn, so that nothing is zero by chance."""

    def make(model, seed=1, **choices):
        patch = Patch.create(model, PatchConfig(**choices)).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in patch.parameters():
            parameter.data.normal_(generator=generator)
        return patch

    return make


@pytest.fixture
def used_patch(model, make_patch, patched):
    """A factory of patches with a forward of the model behind them, off the model again."""

    def make(**choices):
        patch = make_patch(model, **choices)
        patched(patch)
        return patch

    return make
