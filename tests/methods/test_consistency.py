"""DeMe's consistency loss, written out."""

import copy

import pytest
import torch

from stagepatch.families import predict
from stagepatch.methods import DMP, Finetune, LoRA, LoRAConfig
from stagepatch.methods.consistency import Consistent
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
