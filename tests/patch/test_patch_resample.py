"""Prompts and logits on other grids, against Pillow, which resamples on its own."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.families import predict
from stagepatch.patch import Patch, PatchConfig
from stagepatch.patch.resample import resample, resample_tokens


def pillow(values, grid):
    """A picture [H, W] at another height and width."""
    image = Image.fromarray(values.numpy().astype(np.float32), mode="F")
    return torch.from_numpy(np.array(image.resize((grid[1], grid[0]), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (5, 9), (12, 3), (8, 16)], ids=str)
def test_pictures_are_resampled_as_pillow_does(grid):
    values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    resampled = resample(values, grid)
    expected = torch.stack([torch.stack([pillow(picture, grid) for picture in row]) for row in values])
    torch.testing.assert_close(resampled, expected, rtol=1e-5, atol=1e-5)


def test_the_same_grid_is_the_same_tensor():
    values = torch.randn(3, 4, 5)
    assert resample(values, (4, 5)) is values
    tokens = torch.randn(20, 3)
    assert resample_tokens(tokens, (4, 5), (4, 5)) is tokens


def test_tokens_are_the_grids_positions_row_by_row():
    tokens = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    resampled = resample_tokens(tokens, (3, 4), (6, 2))
    expected = torch.stack([pillow(channel.view(3, 4), (6, 2)).flatten() for channel in tokens.T], dim=1)
    torch.testing.assert_close(resampled, expected, rtol=1e-5, atol=1e-5)


def test_frames_are_resampled_as_pictures_and_then_over_time():
    values = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    resampled = resample(values, (7, 3, 9))
    pictures = torch.stack([torch.stack([pillow(frame, (3, 9)) for frame in video]) for video in values])
    expected = torch.stack([pillow(video.flatten(1), (7, 27)).view(7, 3, 9) for video in pictures])
    torch.testing.assert_close(resampled, expected, rtol=1e-5, atol=1e-5)
    still = torch.randn(1, 1, 6, 6).expand(1, 4, 6, 6)
    torch.testing.assert_close(resample(still, (9, 6, 6)), still[:, :1].expand(1, 9, 6, 6))


def test_half_precision_is_resampled_in_float32():
    values = torch.randn(1, 8, 8)
    assert resample(values.bfloat16(), (3, 3)).dtype == torch.bfloat16


def test_gradients_pass():
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: resample(v, (5, 2)), values)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 16)], ids=str)
def test_gated_mixture_at_any_size_is_prompts_and_softmax_resampled_apart(model, make_patch, size):
    """Written out: prompts and logits by Pillow, the softmax over the tokens of the size, times N/N_reference."""
    patch = make_patch(model, sites="first", block_index=False)
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    patch.attach(model)
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    sample, timesteps = torch.randn(2, 1, *size), torch.tensor([10, 800])
    predict(model, sample, timesteps, torch.tensor([0, 1]))
    grid = (size[0] // 2, size[1] // 2)
    logits = patch.last.logits[0].view(2, 4, 4)
    prompts = patch.prompts[0].detach().view(4, 4, -1)
    for row in range(2):
        weights = pillow(logits[row].detach(), grid).flatten().softmax(0) * (grid[0] * grid[1] / 16)
        by_channel = [pillow(prompts[..., channel], grid).flatten() for channel in range(prompts.shape[-1])]
        expected = weights[:, None] * torch.stack(by_channel, dim=1)
        torch.testing.assert_close((entered[1] - entered[0])[row], expected, rtol=1e-4, atol=1e-5)


def test_hard_selection_takes_the_same_share_at_any_size(model, make_patch):
    patch = make_patch(model, selection="hard", top_k=4)
    patch.attach(model)
    for size, chosen in [(8, 4), (16, 16), (4, 1)]:
        predict(model, torch.randn(2, 1, size, size), torch.tensor([10, 800]), torch.tensor([0, 1]))
        weights = patch._weights_on(0, (size // 2, size // 2))
        assert weights.round().sum(-1).tolist() == [chosen, chosen]


def test_grid_of_few_prompts_covers_all_tokens(model, make_patch, batch, patched):
    patch = make_patch(model, grid=[2, 2])
    assert patch.num_parameters() == 3 * 4 * 32 + 33 * 4 + 4
    base = predict(model, *batch)
    assert (patched(patch) - base).abs().flatten(1).amax(dim=1).gt(0).all()
    created = Patch.create(model, PatchConfig(grid=[2, 2]))
    created.prompts[0].data[3] = 1.0
    spread = created._prompts_on(0, (4, 4))[:, 0].view(4, 4)
    assert spread[3, 3] == 1
    assert spread[0].abs().max() == 0
