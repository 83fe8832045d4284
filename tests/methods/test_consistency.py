"""DeMe's consistency loss, and that of Spectral Diffusion, written out."""

import copy

import numpy as np
import pytest
import torch

from stagepatch.families import predict
from stagepatch.methods import DMP, Finetune, LoRA, LoRAConfig
from stagepatch.methods.consistency import Consistent, spectral_distance
from stagepatch.patch import PatchConfig
from tests.runs import draw_weights


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_it_is_the_mean_square_distance_of_the_predictions(tiny_dit, batch, learn_sigma):
    model = tiny_dit(learn_sigma=learn_sigma)
    original = copy.deepcopy(model)
    method = Consistent(Finetune(), weight=0.5)
    (group,) = method.prepare(model)
    predict(model, *batch)
    loss, logged = method.extra_loss()
    assert loss == 0
    draw_weights(group["params"])
    output = predict(model, *batch)
    loss, logged = method.extra_loss()
    difference = (output - predict(original, *batch))[:, :1]
    torch.testing.assert_close(loss, 0.5 * difference.square().mean())
    torch.testing.assert_close(logged["consistency"], difference.square().mean().detach())
    loss.backward()
    assert all(parameter.grad is None for parameter in method.original.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in group["params"] if parameter.grad is not None) > 0


@pytest.mark.parametrize("inner", [DMP(PatchConfig()), LoRA(LoRAConfig(rank=2))], ids=lambda method: method.name)
def test_it_goes_around_any_method_and_keeps_its_own_loss_and_file(tiny_dit, batch, tmp_path, inner):
    model = tiny_dit()
    method = Consistent(inner)
    groups = method.prepare(model)
    draw_weights([parameter for group in groups for parameter in group["params"]])
    output = predict(model, *batch)
    loss, logged = method.extra_loss()
    expected = (output - predict(method.original, *batch))[:, :1].square().mean()
    inner_loss, _ = inner.extra_loss()
    torch.testing.assert_close(loss, expected + (0.0 if inner_loss is None else inner_loss))
    assert logged["consistency"] > 0
    method.save(tmp_path)
    other = tiny_dit()
    method.load(other, tmp_path)
    assert torch.equal(predict(other, *batch), output)


def test_the_spectral_distance_by_hand():
    """A difference of one wave costs its energy over the image's magnitude there."""
    rows, columns = np.mgrid[:8, :8]
    wave = torch.tensor(np.cos(2 * np.pi * (3 * rows + columns) / 8), dtype=torch.float32)
    expected, output = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    output[1, 0] = wave  # of 64 pixels the energy is 32, half at a frequency and half at its mirror image
    image = torch.stack([torch.zeros(1, 8, 8), 5.0 * wave[None]])  # whose magnitude is √64 / 2 · 5 = 20 there
    torch.testing.assert_close(spectral_distance(expected, output, image), torch.tensor(32 / 20 / 128))
    impulse = torch.zeros(2, 1, 8, 8)
    impulse[:, :, 2, 5] = 8.0  # has all frequencies, of magnitude 1
    drawn = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spectral_distance(drawn, output, impulse), (drawn - output).square().mean())
    assert spectral_distance(drawn, output, torch.zeros(2, 1, 8, 8)).isfinite()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_frequencies_that_an_image_has_little_of_count_more(tiny_dit, batch, learn_sigma):
    model = tiny_dit(learn_sigma=learn_sigma)
    original = copy.deepcopy(model)
    method = Consistent(Finetune(), 0.1, spectral=0.3)
    (group,) = method.prepare(model)
    draw_weights(group["params"])
    output = predict(model, *batch)
    method.x_start = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    loss, logged = method.extra_loss()
    difference = (output - predict(original, *batch))[:, :1].detach().numpy()
    image = np.abs(np.fft.fft2(method.x_start.numpy(), norm="ortho"))
    spectral = (np.abs(np.fft.fft2(difference, norm="ortho")) ** 2 / image).mean()
    assert float(logged["spectral"]) == pytest.approx(spectral, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(0.1 * np.square(difference).mean() + 0.3 * spectral, rel=1e-4)
    loss.backward()
    assert any(parameter.grad is not None for parameter in group["params"])
