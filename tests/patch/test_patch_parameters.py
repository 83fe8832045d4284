"""Table 1 (arXiv 2405.17825), on the real architectures, without allocating their weights."""

import pytest
import torch

from stagepatch.families import predict
from stagepatch.families.named_models import NAMED_MODELS, build_named
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


@pytest.mark.parametrize(
    ("sites", "gate", "number", "count"), [("stages", "linear", 9, 2_889_728), ("attention", "none", 16, 2_887_680)]
)
def test_patch_of_stable_diffusion_has_the_papers_parameter_count(sites, gate, number, count):
    """Table 1: +0.32% of 890M, at 256×256."""
    with torch.device("meta"):
        model = build_named("SD-1.5")
        patch = Patch.create(model, PatchConfig(sample_size=32, sites=sites, gate=gate))
    assert (len(patch.prompts), patch.num_parameters()) == (number, count)
    assert abs(100 * count / 890e6 - 0.325) < 0.001


@pytest.mark.parametrize(
    ("name", "base", "share"),
    [
        ("SD-1.5", 859_520_964, 0.0020),
        ("SDXL", 2_567_463_684, 0.0007),
        ("SD3-medium", 2_028_328_000, 0.0048),
        ("FLUX.1-dev", 11_901_408_320, 0.0038),
        ("PixArt-Sigma", 610_856_096, 0.0140),
        ("Wan2.1-1.3B", 1_418_996_800, 0.0086),
    ],
)
def test_small_grids_keep_patches_of_large_models_small(name, base, share):
    model = build_named(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == base
    with torch.device("meta"):
        patch = Patch.create(model, PatchConfig(grid=NAMED_MODELS[name]["grid"]))
    assert abs(patch.num_parameters() / base - share) < 1e-4
