"""What each method trains, and that what it saves brings it back."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.methods import (
    DMP,
    BitFit,
    Finetune,
    LoRA,
    LoRAConfig,
    MethodConfig,
    load_learned,
    make_method,
    open_artifact,
)
from stagepatch.methods.lora import active_ranks
from stagepatch.patch import PatchConfig
from tests.runs import draw_weights
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES


def parameters_of(groups):
    return [parameter for group in groups for parameter in group["params"]]


def count(groups):
    return sum(parameter.numel() for parameter in parameters_of(groups))


def test_dmp_trains_the_patch_alone(tiny_dit):
    model = tiny_dit().requires_grad_(True).train()
    method = DMP(PatchConfig())
    groups = method.prepare(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert method.patch.training
    assert count(groups) == method.patch.num_parameters() == 3 * 16 * 32 + 16 * 33 + 16
    assert set(parameters_of(groups)) == set(method.patch.parameters())


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
    draw_weights(method.patch.parameters(), std=1.0)
    assert not torch.equal(predict(model, *batch), base)
    method.prepare(model)
    assert torch.equal(predict(model, *batch), base)


RANKS = {"lora": LoRAConfig(rank=3), "masked lora": LoRAConfig(rank=4, min_rank=1)}


def make(name, patch=None):
    return make_method(MethodConfig(name.split()[-1], patch or PatchConfig(), RANKS.get(name, LoRAConfig())))


@pytest.mark.parametrize("name", ["dmp", "prompt_tuning", "finetune", "bitfit", *RANKS])
@pytest.mark.parametrize("family", ["DiT", "UNet2DConditionModel", "FluxTransformer2DModel"])
def test_what_is_saved_is_what_was_learned_and_brings_it_back(tmp_path, name, family):
    family = FAMILIES[family]
    model, method = family.model(), make(name, PatchConfig(sample_size=8))
    before = copy.deepcopy(model.state_dict())
    groups = method.prepare(model)
    trained = parameters_of(groups)
    assert all(parameter.requires_grad for parameter in trained)
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} <= set(trained)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        expected = family.call(model)
        method.save(tmp_path)
        saved = [tensor for path in tmp_path.glob("*.safetensors") for tensor in load_file(path).values()]
        mark = 1 if name == "masked lora" else 0  # what other loaders refuse
        assert sum(tensor.numel() for tensor in saved) == count(groups) + mark
        other = family.model()
        assert not torch.allclose(family.call(other), expected, atol=1e-4)
        loaded = load_learned(other, tmp_path)
        assert torch.equal(family.call(other), expected)
    assert type(loaded) is type(method) or isinstance(method, type(loaded))
    if name not in ("finetune", "bitfit"):
        kept = {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(kept[key], value) for key, value in before.items())


def test_finetuning_trains_every_weight(tiny_dit):
    model = tiny_dit()
    assert count(Finetune().prepare(model)) == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_bitfit_trains_biases_and_norms_alone():
    model = FAMILIES["UNet2DConditionModel"].model()
    BitFit().prepare(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith("bias") or ".norm" in name or "conv_norm" in name for name in trained)
    assert {"conv_norm_out.weight", "conv_in.bias", "mid_block.attentions.0.norm.weight"} <= trained
    assert "conv_in.weight" not in trained


def test_pretraining_saves_a_whole_model(tiny_dit, batch, tmp_path):
    model, method = tiny_dit(), Finetune(make_scheduler(ObjectiveConfig()))
    method.prepare(model)
    method.save(tmp_path)
    loaded, scheduler = load_denoiser(tmp_path)
    assert torch.equal(predict(loaded, *batch), predict(model, *batch))
    assert scheduler.config.num_train_timesteps == 1000


def test_nothing_is_learned_by_the_base(tiny_dit, tmp_path):
    model = tiny_dit().requires_grad_(True)
    assert make("none").prepare(model) == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_matched_prompt_tuning_takes_the_step_that_a_uniform_gate_does(tiny_dit):
    for name, matched, factor in (("prompt_tuning", True, 1 / 16), ("prompt_tuning", False, 1.0), ("dmp", True, 1.0)):
        prompts = make(name, PatchConfig(matched_step=matched)).prepare(tiny_dit())[0]
        assert prompts["factor"] == factor


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_saved_lora_is_read_by_its_pipeline(tmp_path, name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    base = tiny.call(pipe)
    pipe.save_pretrained(tmp_path / "model")
    trained = tiny.load(tmp_path / "model")
    method = LoRA(LoRAConfig(rank=2))
    (group,) = method.prepare(trained.unet if hasattr(trained, "unet") else trained.transformer)
    draw_weights(group["params"])
    expected = tiny.call(trained)
    method.save(tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(tiny.call(pipe), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-3)


WEIGHED = [{"rank": 4, "min_rank": 1}, {"rank": 2, "num_stages": 2}, {"num_stages": 2, "stage_gate": "learned"}]


@pytest.mark.parametrize("choices", WEIGHED, ids=str)
def test_a_lora_that_is_weighed_by_timestep_is_refused_by_a_loader_that_would_not_weigh_it(tmp_path, choices):
    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe = tiny.build()
    method = LoRA(LoRAConfig(**choices))
    draw_weights(method.prepare(pipe.transformer)[0]["params"])
    expected = tiny.call(pipe)
    method.save(tmp_path)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        tiny.build().load_lora_weights(tmp_path)
    ours = tiny.build()
    open_artifact(tmp_path).put_on(ours)
    torch.testing.assert_close(tiny.call(ours), expected)
    file = tmp_path / "pytorch_lora_weights.safetensors"  # as it was written before
    save_file({name: value for name, value in load_file(file).items() if "weighed_by" not in name}, file)
    former = tiny.build()
    open_artifact(tmp_path).put_on(former)
    torch.testing.assert_close(tiny.call(former), expected)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_other_pipelines_loaders_refuse_it_too(tmp_path, name):
    """Flux's passes over what has no "lora" in its name."""
    pipe = PIPELINES[name].build()
    method = LoRA(LoRAConfig(rank=2, min_rank=1))
    method.prepare(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    method.save(tmp_path)
    with pytest.raises(ValueError, match=r"Invalid LoRA checkpoint|weighed_by_timestep"):
        PIPELINES[name].build().load_lora_weights(tmp_path)


def test_adapters_sit_at_the_attention_and_start_at_nothing(tiny_dit, batch):
    model = tiny_dit()
    base = predict(model, *batch)
    (group,) = LoRA(LoRAConfig(rank=4)).prepare(model)
    assert count([group]) == 3 * (4 * (32 + 96) + 4 * (32 + 32))
    assert torch.equal(predict(model, *batch), base)
    (group,) = LoRA(LoRAConfig(rank=4, targets=["fc1"])).prepare(tiny_dit())
    assert count([group]) == 3 * 4 * (32 + 128)


def test_targets_that_are_not_there_are_named(tiny_dit):
    with pytest.raises(UserError, match=r"targets=\['to_z'\] cannot be had in DiT"):
        LoRA(LoRAConfig(targets=["to_z"])).prepare(tiny_dit())


@pytest.mark.parametrize("choices", [{"rank": 0}, {"rank": 4, "min_rank": 5}, {"min_rank": -1}], ids=str)
def test_ranks_out_of_range_are_refused(choices):
    with pytest.raises(UserError, match=r"0 ≤ min_rank ≤ rank|rank=(0|-1) must be at least"):
        LoRA(LoRAConfig(**choices))


def test_ranks_come_on_as_noise_falls(tiny_dit, batch):
    """Of four ranks one at pure noise, all at the image; a sample's output is that of a LoRA cut to its ranks."""
    assert active_ranks(torch.tensor([1.0, 0.7, 0.5, 0.34, 0.0]), 4, 1).tolist() == [1, 1, 2, 2, 4]
    sample, _, labels = batch
    timesteps = torch.tensor([999, 600, 300, 0])
    model = tiny_dit()
    (group,) = LoRA(LoRAConfig(rank=4, min_rank=1)).prepare(model)
    draw_weights(group["params"], std=1.0)
    masked = predict(model, sample, timesteps, labels)
    for row, ranks in enumerate((1, 2, 3, 4)):
        cut = tiny_dit()
        (other,) = LoRA(LoRAConfig(rank=4)).prepare(cut)
        for ours, theirs in zip(other["params"], group["params"], strict=True):
            ours.data.copy_(theirs)
            if ours.shape[0] == 4:  # lora_A: [rank, in]
                ours.data[ranks:] = 0.0
        torch.testing.assert_close(predict(cut, sample, timesteps, labels)[row], masked[row], rtol=1e-4, atol=1e-4)


def test_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"No method 'dpm'\. Methods: dmp, prompt_tuning, finetune"):
        make("dpm")


def test_directories_of_nothing_learned_and_of_other_models_are_refused(tiny_dit, tmp_path):
    for path, message in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no patch, no LoRA, no weights")):
        with pytest.raises(UserError, match=message):
            load_learned(tiny_dit(), path)
    for name in ("finetune", "lora"):
        method = make(name)
        method.prepare(tiny_dit(num_layers=4))
        method.save(tmp_path / name)
        with pytest.raises(UserError, match=r"is of another model: it holds '(base_model\.model\.)?blocks\.3"):
            load_learned(tiny_dit(), tmp_path / name)
