"""What each method trains, and that what it saves brings it back."""

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.backbones import predict
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.methods import DMP, Finetune
from stagepatch.patch import PatchConfig


def count(groups):
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def test_dmp_trains_the_patch_alone(tiny_dit):
    model = tiny_dit().requires_grad_(True).train()
    method = DMP(PatchConfig())
    groups = method.prepare(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert method.patch.training
    assert count(groups) == method.patch.num_parameters() == 3 * 16 * 32 + 16 * 33 + 16
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in method.patch.parameters()}


def test_the_gates_rate_has_a_factor_of_its_own(tiny_dit):
    prompts, gate = DMP(PatchConfig(gate_learning_rate_factor=0.25)).prepare(tiny_dit())
    assert (prompts["factor"], gate["factor"]) == (1.0, 0.25)
    assert count([gate]) == 16 * 34
    assert len(DMP(PatchConfig(gate="none")).prepare(tiny_dit())) == 1


def test_dmp_adds_the_balance_losses(tiny_dit, batch):
    method = DMP(PatchConfig(importance_weight=2.0, load_weight=0.5, load_loss="surrogate"))
    model = tiny_dit()
    method.prepare(model)
    torch.nn.init.normal_(method.patch.gate.weight)
    predict(model, *batch)
    loss, logged = method.extra_loss()
    torch.testing.assert_close(loss.detach(), 2.0 * logged["importance"] + 0.5 * logged["load"])
    assert loss > 0
    assert 0 < logged["gate_entropy"] < torch.log(torch.tensor(16.0))
    tuning = DMP(PatchConfig(gate="none"))
    tuning.prepare(tiny_dit())
    assert tuning.extra_loss() == (None, {})


def test_preparing_again_replaces_the_patch(tiny_dit, batch):
    model, method = tiny_dit(), DMP(PatchConfig())
    base = predict(model, *batch)
    method.prepare(model)
    for parameter in method.patch.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(predict(model, *batch), base)
    method.prepare(model)
    assert torch.equal(predict(model, *batch), base)


@pytest.mark.parametrize("name", ["dmp", "finetune"])
def test_save_and_load_bring_back_the_output(tiny_dit, batch, tmp_path, name):
    scheduler = make_scheduler(ObjectiveConfig())

    def make():
        return DMP(PatchConfig()) if name == "dmp" else Finetune(scheduler)

    model, method = tiny_dit(), make()
    groups = method.prepare(model)
    with torch.no_grad():
        for group in groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        expected = predict(model, *batch)
        method.save(tmp_path)
        other = tiny_dit()
        assert not torch.equal(predict(other, *batch), expected)
        make().load(other, tmp_path)
        assert torch.equal(predict(other, *batch), expected)
    if name == "dmp":  # what is saved is the patch alone
        assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) == count(groups)


def test_finetuning_trains_every_weight(tiny_dit):
    model = tiny_dit()
    method = Finetune(make_scheduler(ObjectiveConfig()))
    assert count(method.prepare(model)) == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
