"""Channel-wise projections: their number, the identity at first, folded away."""

import copy

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import add_projections, fold_projections, load_denoiser, save_denoiser
from stagepatch.core.errors import UserError
from tests.tiny import FAMILIES

UNETS = ["UNet2DModel", "UNet2DConditionModel"]


def test_the_lsun_unet_grows_to_the_papers_size():
    with torch.device("meta"):
        model = diffusers.UNet2DModel(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
            attention_head_dim=None,
        )
        base = sum(parameter.numel() for parameter in model.parameters())
        projection = add_projections(model)
    grown = sum(parameter.numel() for parameter in model.parameters())
    assert len(projection.maps) == 13
    assert (round(base / 1e6, 2), round(grown / 1e6, 2)) == (113.67, 115.31)


@pytest.mark.parametrize("name", [*UNETS, "DiT", "SD3Transformer2DModel"])
def test_identity_at_first_and_gradients_reach_every_map(name):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    projection = add_projections(model)
    output = family.call(model)
    torch.testing.assert_close(output, base, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    assert all(weight.grad.abs().amax(dim=1).gt(0).all() for weight in projection.maps.values())


def disturb(model):
    with torch.no_grad():
        for weight in add_projections(model).maps.values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    return model


@pytest.mark.parametrize("name", UNETS)
def test_folding_keeps_the_output_and_leaves_what_cannot_be_folded(name):
    family = FAMILIES[name]
    plain = family.call(family.model().double())
    model = disturb(family.model()).double()
    expected = family.call(model)
    assert not torch.allclose(expected, plain, rtol=1e-2)
    assert fold_projections(model) == ["down_blocks.1", "mid_block", "up_blocks.1"]
    assert len(model.stagepatch_projection.maps) == 3
    torch.testing.assert_close(family.call(model), expected, rtol=1e-9, atol=1e-9)


def test_models_of_tokens_keep_theirs():
    model = FAMILIES["DiT"].model()
    assert fold_projections(model) == []
    add_projections(model)
    assert fold_projections(model) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("name", ["UNet2DModel", "DiT"])
def test_projections_are_saved_copied_and_loaded_as_a_part_of_the_model(name, tmp_path):
    family = FAMILIES[name]
    model = disturb(family.model())
    copied = copy.deepcopy(model)
    fold_projections(model)
    expected = family.call(model)
    save_denoiser(model, diffusers.DDPMScheduler(), tmp_path)
    loaded, _ = load_denoiser(tmp_path)
    assert torch.equal(family.call(loaded), expected)
    torch.testing.assert_close(family.call(copied), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        copied.stagepatch_projection.maps["0"].zero_()
    assert torch.equal(family.call(loaded), expected)
    assert not torch.allclose(family.call(copied), expected, rtol=1e-2)
    path = next(tmp_path.glob("*/diffusion_pytorch_model.safetensors"))
    save_file({**load_file(path), "stagepatch_projection.maps.0": torch.eye(3)}, path)
    with pytest.raises(UserError, match="tensors differ, first"):
        load_denoiser(tmp_path)
