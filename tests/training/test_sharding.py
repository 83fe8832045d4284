"""A base that two processes share trains the same patch as one that is whole."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from stagepatch.core import UserError
from stagepatch.methods import DMP, LoRA, LoRAConfig
from stagepatch.patch import Patch, PatchConfig
from stagepatch.studies import DecoupleConfig
from stagepatch.studies.decouple_config import StageTrainingConfig
from stagepatch.training import Run, TrainConfig
from stagepatch.training.sharding import shard_base
from tests.runs import assert_same, make_model, run
from tests.tiny import FAMILIES

METHODS = {
    "dmp": (lambda: DMP(PatchConfig(initialization="normal")), "model.safetensors"),
    "lora": (lambda: LoRA(LoRAConfig(rank=4)), "pytorch_lora_weights.safetensors"),
}


def train_all(directory, shared=False):
    """One run a method; where the base is shared, half of it is in this process."""
    for name, (make, _) in METHODS.items():
        model = make_model()
        size = sum(parameter.numel() for parameter in model.parameters())
        choices = {"steps": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "ema_decay": 0.9}
        run(directory / name, method=make(), model=model, shard_base=shared, **choices)
        own = [parameter.to_local().numel() for parameter in model.parameters() if isinstance(parameter, DTensor)]
        assert 0.48 * size < sum(own) < 0.52 * size if shared else not own


def output_and_gradients(name, shared):
    family = FAMILIES[name]
    model = family.model()
    if shared:
        shard_base(model)
    torch.manual_seed(0)
    patch = Patch.create(model, PatchConfig(initialization="normal"))
    patch.attach(model)
    output = family.call(model)
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in patch.parameters())]


def job(directory):
    train_all(directory / "whole")
    train_all(directory / "shared", True)
    # One embeds the timestep inside its first block, which is run out of it; the other has stages for blocks.
    for name in ("DiTTransformer2DModel", "UNet2DModel"):
        assert_same(output_and_gradients(name, True), output_and_gradients(name, False))
    with pytest.raises(UserError, match="for methods that leave the base frozen"):
        run(directory / "finetune", method="finetune", shard_base=True)
    with pytest.raises(UserError, match="goes without compile"):
        run(directory / "compiled", compile=True, shard_base=True)


def test_two_processes_that_share_the_base_train_as_one(processes, tmp_path):
    processes.call(train_all, directory=tmp_path / "one")
    processes.call_together(job, 2, directory=tmp_path / "two")
    for name, (_, file) in METHODS.items():
        one, shared, whole = (load_file(tmp_path / run / name / file) for run in ("one", "two/shared", "two/whole"))
        assert_same(shared, whole)
        assert_same(shared, one, 1e-5)  # two processes add up a batch's gradients in another order
    one, two = ((tmp_path / run / "dmp" / "config.json").read_text() for run in ("one", "two/shared"))
    assert one == two, "the patch is for another model"


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="among processes, and there is one"):
        run(tmp_path, shard_base=True)
    with pytest.raises(UserError, match="set consistency to 0"):
        DecoupleConfig(method="lora", training=StageTrainingConfig(shard_base=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="launch without it, and give"):
        Run(TrainConfig())
