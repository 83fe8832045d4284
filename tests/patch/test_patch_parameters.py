"""Table 1 (arXiv 2405.17825), on the real architectures, without allocating their weights."""

import pytest
import torch

from stagepatch.backbones import predict
from stagepatch.models import DIT_SIZES, DiT
from stagepatch.patch import Patch, PatchConfig


@pytest.mark.parametrize(
    ("name", "added", "percent"),
    [("DiT-B/2", 2_556_416, 1.96), ("DiT-L/2", 6_554_112, 1.43), ("DiT-XL/2", 8_552_960, 1.26)],
)
def test_patch_has_the_papers_parameter_count(name, added, percent):
    with torch.device("meta"):
        model = DiT.from_name(name, sample_size=32)
    patch = Patch.create(model)
    base = sum(parameter.numel() for parameter in model.parameters())
    blocks, tokens, channels = DIT_SIZES[name]["num_layers"], 256, DIT_SIZES[name]["hidden_size"]
    assert patch.num_parameters() == added
    assert added == blocks * tokens * channels + (channels + 1) * tokens + tokens
    assert int(10_000 * added / base) / 100 == percent  # the paper cuts: 1.2674% is 1.26%
    assert all(parameter.is_meta for parameter in patch.parameters())
    assert not any(parameter.is_meta for parameter in Patch(PatchConfig(sites="first"), patch.backbone).parameters())


def test_patch_on_the_meta_device_runs_a_forward(tiny_dit, batch):
    model = tiny_dit().to("meta")
    for experts in (1, 2):
        with Patch.create(model, PatchConfig(num_experts=experts)).attach(model):
            assert predict(model, *(tensor.to("meta") for tensor in batch)).shape == (4, 2, 8, 8)
