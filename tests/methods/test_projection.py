"""Channel-wise projections: their number, the identity at first, folded away."""

import diffusers
import pytest
import torch

from stagepatch.methods.projection import ChannelProjection
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
        projection = ChannelProjection(model)
    base = sum(parameter.numel() for parameter in model.parameters())
    grown = base + sum(parameter.numel() for parameter in projection.parameters())
    assert len(projection.maps) == 13
    assert (round(base / 1e6, 2), round(grown / 1e6, 2)) == (113.67, 115.31)


@pytest.mark.parametrize("name", [*UNETS, "DiT", "SD3Transformer2DModel"])
def test_identity_at_first_and_gradients_reach_every_map(name):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    projection = ChannelProjection(model)
    handles = projection.attach(model)
    output = family.call(model)
    torch.testing.assert_close(output, base, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    assert all(weight.grad.abs().amax(dim=1).gt(0).all() for weight in projection.maps)
    for handle in handles:
        handle.remove()
    assert torch.equal(family.call(model), base)


@pytest.mark.parametrize("name", UNETS)
def test_folding_keeps_the_output_and_leaves_what_cannot_be_folded(name):
    family = FAMILIES[name]
    model = family.model().double()
    projection = ChannelProjection(model).double()
    with torch.no_grad():
        for weight in projection.maps:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    handles = projection.attach(model)
    expected = family.call(model)
    left = projection.fold(model)
    torch.testing.assert_close(family.call(model), expected, rtol=1e-9, atol=1e-9)
    assert left == ["down_blocks.1", "mid_block", "up_blocks.1"]
    for path, handle in zip(projection.paths, handles, strict=True):
        if path not in left:
            handle.remove()
    torch.testing.assert_close(family.call(model), expected, rtol=1e-9, atol=1e-9)


def test_models_of_tokens_keep_theirs():
    model = FAMILIES["DiT"].model()
    projection = ChannelProjection(model)
    assert projection.fold(model) == ["blocks.0", "blocks.1"]
