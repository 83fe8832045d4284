import math

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.embeddings import get_timestep_embedding as diffusers_features

from stagepatch.models.embeddings import TimestepEmbedder, sincos_positions


@pytest.mark.parametrize("size", [4, 16, 32])
def test_square_positions_equal_diffusers(size):
    expected = get_2d_sincos_pos_embed(32, size, base_size=size).float()
    assert torch.equal(sincos_positions(32, size, size)[0], expected)


def test_non_square_positions_are_a_crop_of_a_square():
    square = get_2d_sincos_pos_embed(32, 8, base_size=8).float().view(8, 8, 32)
    assert torch.equal(sincos_positions(32, 3, 8)[0].view(3, 8, 32), square[:3])
    assert torch.equal(sincos_positions(32, 8, 3)[0].view(8, 3, 32), square[:, :3])


def test_non_square_positions_by_hand():
    positions = sincos_positions(8, 2, 3)
    assert positions.shape == (1, 6, 8)
    assert positions.dtype == torch.float32

    def angles(place):  # D = 8: four channels a direction, at frequencies 1 and 10000^(-1/2)
        return [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]

    expected = torch.tensor([angles(column) + angles(row) for row in range(2) for column in range(3)])
    assert torch.allclose(positions[0], expected, atol=1e-7)


def test_positions_follow_the_device_asked_for_and_are_real_inside_a_meta_context():
    assert sincos_positions(8, 2, 3, device="meta").device.type == "meta"
    assert sincos_positions(8, 2, 3, device="cpu").device.type == "cpu"
    with torch.device("meta"):
        assert sincos_positions(8, 2, 3).device.type == "cpu"


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_features_have_cosines_first_and_the_given_shift(shift):
    embedder = TimestepEmbedder(16, downscale_freq_shift=shift)
    seen = []
    embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    timesteps = torch.tensor([0, 1, 999])
    embedder(timesteps)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / (128 - shift))
    angles = timesteps.double()[:, None] * frequencies
    # float32 angles near 999 carry an error of some 6e-5
    assert torch.allclose(seen[0].double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=2e-4)
    expected = diffusers_features(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert torch.equal(seen[0], expected)


def test_timestep_embedding_takes_fractions():
    embedder = TimestepEmbedder(16)
    between = embedder(torch.tensor([0.5]))
    assert not torch.allclose(between, embedder(torch.tensor([0])), atol=1e-4)
