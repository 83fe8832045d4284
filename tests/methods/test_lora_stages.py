"""Low-rank maps mixed by the noise level, and sampling with them in the weights."""

import copy
from itertools import pairwise
from unittest.mock import patch as replaced

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stagepatch.core import UserError, read_json, write_json
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.methods import LoRA, LoRAConfig, load_learned
from stagepatch.methods.lora import ADAPTER, CONFIG_NAME, FILE_NAME, read_config
from stagepatch.methods.lora_stages import GATES, Ranks, StageGate
from stagepatch.sampling import SamplingConfig, generate
from tests.runs import draw_weights, run
from tests.tiny import FAMILIES, FRAMES

STAGED = LoRAConfig(rank=2, num_stages=3)


def lora_on(model, std=0.3, **choices):
    """A LoRA whose maps are drawn."""
    method = LoRA(LoRAConfig(**choices))
    group, *_ = method.prepare(model)
    draw_weights(group["params"], std)
    return method


def maps_of(model):
    """A and B of every adapted layer."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    return [(layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data) for layer in layers]


def gaussians(levels, num_stages):
    """The gate as its definition has it, in float64."""
    centres = (torch.arange(num_stages, dtype=torch.float64) + 0.5) / num_stages
    densities = torch.exp(-0.5 * ((levels.double()[:, None] - centres) * 2 * num_stages) ** 2)
    return densities / densities.sum(dim=1, keepdim=True)


@pytest.fixture
def merges():
    """The layers whose weights were merged, in order."""
    seen, own = [], Ranks.merged_weight
    with replaced.object(Ranks, "merged_weight", lambda ranks, layer: seen.append(layer) or own(ranks, layer)):
        yield seen


@pytest.mark.parametrize("num_stages", [1, 2, 4, 10])
@pytest.mark.parametrize("kind", GATES)
def test_weights_sum_to_one_and_are_those_of_the_definition(kind, num_stages):
    timesteps = torch.arange(1001)
    weights = StageGate(num_stages, 3, kind).stages(timesteps / 1000)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(1001))
    if kind == "ranges":
        assert torch.equal(weights.argmax(dim=1), (timesteps * num_stages // 1000).clamp(max=num_stages - 1))
        assert set(weights.unique().tolist()) <= {0.0, 1.0}
    else:
        expected = gaussians(timesteps / 1000, num_stages)
        torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(weights.repeat_interleave(3, dim=1), StageGate(num_stages, 3, kind)(timesteps / 1000))


def test_stages_start_at_the_base_and_hold_rank_maps_each(tiny_dit, batch):
    model = tiny_dit()
    base = predict(model, *batch)
    (group,) = LoRA(STAGED).prepare(model)
    assert sum(value.numel() for value in group["params"]) == 3 * 3 * 2 * ((32 + 96) + (32 + 32))
    assert torch.equal(predict(model, *batch), base)


@pytest.mark.parametrize("kind", GATES)
def test_a_layer_is_base_plus_the_weighed_maps(tiny_dit, batch, kind):
    """Against a closed form in float64, for samples of different timesteps."""
    sample, timesteps, labels = batch
    model = tiny_dit()
    method = lora_on(model, rank=2, num_stages=3, stage_gate=kind)
    layer = model.blocks[1].attn.qkv
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    predict(model, sample, timesteps, labels)
    levels = timesteps / 1000
    weights = method.gate.stages(levels).double() if kind == "ranges" else gaussians(levels, 3)
    x, base = seen["x"].double(), layer.base_layer
    expected = x @ base.weight.double().T + base.bias.double()
    a, b = (part[ADAPTER].weight.double() for part in (layer.lora_A, layer.lora_B))
    for stage in range(3):
        own = slice(2 * stage, 2 * stage + 2)
        expected = expected + weights[:, stage, None, None] * (x @ a[own].T @ b[:, own].T)
    torch.testing.assert_close(seen["output"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["DiT", "UNet2DModel", "UNet2DConditionModel"])
@pytest.mark.parametrize("targets", [None, "all"])
def test_ranges_are_plain_loras_each_in_its_own(family, targets):
    """In a batch of two ranges each sample's output is that of its stage's maps as a LoRA of their own."""
    tiny, rank = FAMILIES[family], 2
    model = tiny.model()
    lora_on(model, rank=rank, num_stages=3, stage_gate="ranges", targets=targets)
    for timesteps in (torch.tensor([900, 10]), torch.tensor([333, 334]), torch.tensor([666, 667])):
        output = tiny.call(model, timestep=timesteps)
        for row, stage in enumerate((timesteps * 3 // 1000).tolist()):
            plain = tiny.model()
            LoRA(LoRAConfig(rank=rank, targets=targets)).prepare(plain)
            own = slice(rank * stage, rank * stage + rank)
            for (a, b), (all_a, all_b) in zip(maps_of(plain), maps_of(model), strict=True):
                a.copy_(all_a[own])
                b.copy_(all_b[:, own])
            expected = tiny.call(plain, timestep=timesteps)
            torch.testing.assert_close(output[row], expected[row], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(output[1 - row], expected[1 - row], atol=1e-3)


def test_a_convolutions_ranks_are_its_channels():
    tiny, timesteps = FAMILIES["UNet2DModel"], torch.tensor([40, 400])  # of the first stage
    staged, plain = tiny.model(), tiny.model()
    lora_on(staged, rank=1, num_stages=2, stage_gate="ranges", targets=["conv1"])
    lora_on(plain, rank=1, targets=["conv1"])
    for (a, b), (all_a, all_b) in zip(maps_of(plain), maps_of(staged), strict=True):
        a.copy_(all_a[:1])
        b.copy_(all_b[:, :1])
    expected = tiny.call(plain, timestep=timesteps)
    torch.testing.assert_close(tiny.call(staged, timestep=timesteps), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny.call(staged, timestep=timesteps + 500), tiny.call(plain, timestep=timesteps + 500))


def test_a_learned_gate_starts_as_the_gaussians_and_gets_gradients(tiny_dit, batch):
    outputs = {}
    for kind in ("gaussian", "learned"):
        model = tiny_dit()
        method = lora_on(model, rank=2, num_stages=3, stage_gate=kind)
        outputs[kind] = predict(model, *batch)
    assert torch.equal(outputs["gaussian"], outputs["learned"])
    outputs["learned"].square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in method.gate.parameters())
    groups = LoRA(LoRAConfig(num_stages=3, stage_gate="learned")).prepare(tiny_dit())
    assert [sum(value.numel() for value in group["params"]) for group in groups][1] == 6
    copied = copy.deepcopy(model)  # after a forward that has a history
    assert torch.equal(predict(copied, *batch), outputs["learned"])


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("targets", [None, "all", ["mlp.fc1"]], ids=str)
def test_what_is_saved_comes_back_exactly(tiny_dit, batch, tmp_path, kind, targets):
    model = tiny_dit()
    method = lora_on(model, rank=2, num_stages=3, stage_gate=kind, targets=targets)
    draw_weights([value for value in method.gate.parameters() if value.requires_grad], 2.0)
    method.save(tmp_path)
    gate_keys = {name for name in load_file(tmp_path / FILE_NAME) if "stage_gate" in name}
    learned = {"transformer.stage_gate.weight", "transformer.stage_gate.bias"}
    assert gate_keys == (learned if kind == "learned" else set())
    other = tiny_dit()
    loaded = load_learned(other, tmp_path)
    assert loaded.config == method.config
    assert torch.equal(predict(other, *batch), predict(model, *batch))
    with torch.no_grad():
        same = (batch[0], torch.full((4,), 400), batch[2])
        assert torch.equal(predict(other, *same), predict(model, *same))


def test_a_run_trains_the_maps_and_the_gate(tmp_path):
    method = LoRA(LoRAConfig(rank=2, num_stages=2, stage_gate="learned"))
    run(tmp_path, method=method, steps=3, ema_decay=0.5)
    start = StageGate(2, 2)
    saved = load_file(tmp_path / FILE_NAME)
    assert not torch.equal(saved["transformer.stage_gate.weight"], start.weight)
    assert all(value.abs().max() > 0 for value in saved.values())


CHOICES = {
    "stages": {"rank": 2, "num_stages": 3},
    "learned": {"rank": 2, "num_stages": 3, "stage_gate": "learned", "targets": "all"},
    "ranges": {"rank": 2, "num_stages": 3, "stage_gate": "ranges"},
    "plain": {"rank": 4},
    "T-LoRA": {"rank": 4, "min_rank": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("family", ["DiT", "UNet2DModel", "FluxTransformer2DModel"])
def test_merged_is_unmerged(merges, family, name, dtype):
    """Alike timesteps without gradients are done with merged weights; the model's own stay as they are."""
    tiny = FAMILIES[family]
    model = tiny.model().to(dtype)
    method = lora_on(model, std=0.1, **CHOICES[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start, end = (0.0, 1.0) if family.startswith("Flux") else (0.0, 1000.0)
    with torch.no_grad():
        for level in (0.9, 0.5, 0.1):
            timesteps = torch.full((2,), start + level * (end - start))
            method.merge(False)
            merges.clear()
            expected = tiny.call(model, timestep=timesteps).float()
            assert not merges
            method.merge()
            output = tiny.call(model, timestep=timesteps).float()
            assert merges
            tolerance = 1e-5 if dtype == torch.float32 else 0.1
            error = (output - expected).abs().max()
            assert error <= tolerance * expected.abs().max()
            assert torch.equal(output, tiny.call(model, timestep=timesteps).float())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_alike_timesteps_without_gradients_are_merged(merges, tiny_dit, batch):
    sample, timesteps, labels = batch
    model = tiny_dit()
    method = lora_on(model, rank=2, num_stages=3, stage_gate="ranges")
    alike = torch.full((4,), 500)
    with torch.no_grad():
        predict(model, sample, alike, labels)
        assert len(merges) == 6
        rows = torch.cat([predict(model, sample, time.expand(4), labels)[i, None] for i, time in enumerate(timesteps)])
        merges.clear()
        torch.testing.assert_close(predict(model, sample, timesteps, labels), rows, rtol=1e-4, atol=1e-4)
        assert not merges
        predict(model, sample, torch.tensor([340, 400, 500, 660]), labels)  # one range
        assert len(merges) == 6
        merges.clear()
        predict(model, sample[:1], torch.tensor([500]), labels[:1])  # 16 tokens: cheaper through the maps
        assert not merges
    predict(model, sample, alike, labels)
    assert not merges
    for enabled in (False, True):
        method.merge(enabled)
        with torch.no_grad():
            predict(model, sample, alike, labels)
        assert len(merges) == 6 * enabled


def test_merged_weights_follow_the_maps_however_they_change(tiny_dit, batch):
    """An average is copied to `.data`, a checkpoint too, which counts as no new version of a parameter."""
    model, other = tiny_dit(), tiny_dit()
    lora_on(model, rank=2, num_stages=3)
    same = (batch[0], torch.full((4,), 400), batch[2])
    with torch.no_grad():
        before = predict(model, *same)
        for a, b in maps_of(model):
            a.mul_(2.0)
            b.add_(0.1)
        after = predict(model, *same)
        lora_on(other, rank=2, num_stages=3)
        for (a, b), (own_a, own_b) in zip(maps_of(other), maps_of(model), strict=True):
            a.copy_(own_a)
            b.copy_(own_b)
        assert not torch.allclose(after, before, atol=1e-3)
        assert torch.equal(after, predict(other, *same))


def test_autocast_leaves_the_merge_in_its_own_dtype(tiny_dit):
    model = tiny_dit()
    method = lora_on(model, rank=2)
    layer = model.blocks[0].attn.qkv
    with torch.no_grad():
        expected = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
        with torch.autocast("cpu", torch.bfloat16):
            merged = method.ranks.merged_weight(layer)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_a_layer_with_a_hook_or_another_adapter_is_left_to_peft(merges, tiny_dit, batch):
    import peft

    model = tiny_dit()
    lora_on(model, rank=2, num_stages=3)
    same = (batch[0], torch.full((4,), 400), batch[2])
    seen = []
    model.blocks[0].attn.qkv.base_layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        predict(model, *same)
        assert (len(merges), len(seen)) == (5, 1)
        merges.clear()
        other = peft.LoraConfig(r=1, target_modules=["attn.qkv"])
        peft.inject_adapter_in_model(other, model, adapter_name="other")
        for block in model.blocks:
            block.attn.qkv.set_adapter(["stagepatch"])
            block.attn.proj.set_adapter(["stagepatch"])
        model.blocks[1].attn.qkv.set_adapter(["stagepatch", "other"])
        model.blocks[2].attn.qkv.enable_adapters(False)
        predict(model, *same)
        assert len(merges) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_merges_once_a_step_and_gives_the_same_images(merges, tiny_dit, dtype):
    model = tiny_dit(learn_sigma=False)
    method = lora_on(model, std=0.1, rank=2, num_stages=3)
    model.to(dtype)  # the maps too, as when they are loaded
    scheduler = make_scheduler(ObjectiveConfig(), False)
    config = SamplingConfig(num_images=4, batch_size=4, num_inference_steps=5, guidance_scale=2.0)
    merged = generate(model, scheduler, config)
    assert len(merges) == 5 * 6
    method.merge(False)
    unmerged = generate(model, scheduler, config)
    assert len(merges) == 5 * 6
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert (merged - unmerged).abs().max() <= tolerance * unmerged.abs().max()


NOT_WEIGHED = ("ErnieImageTransformer2DModel", "QwenImageTransformer2DModel of edits")


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_an_attentions_way_in_and_way_out_are_targets(family):
    model = FAMILIES[family].model()
    LoRA(LoRAConfig(rank=1)).prepare(model)
    ends = {path.split(".lora_A")[0] for path, _ in model.named_parameters() if ".lora_A." in path}
    for names in (("to_q", "to_query", "qkv", "img_qkv_proj"), ("to_out.0", "to_out", "attn.proj", "out_layer")):
        assert any(path.endswith(names) for path in ends), names


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_WEIGHED])
def test_all_targets_the_linear_layers_of_blocks(family):
    tiny = FAMILIES[family]
    model = tiny.model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    lora_on(model, rank=1, num_stages=2, targets="all")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    outside = linear - adapted
    assert adapted < linear
    assert any("attn" in name or "attention" in name for name in adapted)
    prefixes = (
        "blocks.",
        "transformer_blocks.",
        "single_transformer_blocks.",
        "down_blocks.",
        "up_blocks.",
        "mid_block.",
        "double_stream_blocks.",
        "single_stream_blocks.",
    )
    assert not any(name.startswith(prefixes) and ".ff_i.experts." not in name for name in outside)
    tiny.call(model)


def test_ranks_are_not_weighed_where_tokens_come_before_samples():
    tiny = FAMILIES["ErnieImageTransformer2DModel"]
    model = tiny.model()
    with pytest.raises(UserError, match=r"ErnieImageTransformer2DModel.*tokens before samples: take one stage"):
        lora_on(model, rank=1, num_stages=2)
    model = tiny.model()
    lora_on(model, rank=1, num_stages=1)
    tiny.call(model)


def test_ranks_are_not_weighed_where_layers_take_another_timestep_beside_the_samples():
    tiny = FAMILIES["QwenImageTransformer2DModel of edits"]
    with pytest.raises(UserError, match=r"QwenImageTransformer2DModel with zero_cond_t.*: take one stage"):
        lora_on(tiny.model(), rank=1, num_stages=2)
    model = tiny.model()
    lora_on(model, rank=1, num_stages=1)
    tiny.call(model)


def test_all_of_the_dit_is_attention_mlp_and_modulation(tiny_dit):
    paths = []
    for targets in ("all", ["all"]):
        model = tiny_dit()
        lora_on(model, rank=1, targets=targets)
        paths.append([name for name, module in model.named_modules() if hasattr(module, "lora_A")])
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert paths[0] == paths[1] == [f"blocks.{number}.{name}" for number in range(3) for name in layers]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"stage_gate": "soft"}, "stage_gate='soft' is none of: gaussian, learned, ranges"),
        ({"rank": 4, "min_rank": 1, "num_stages": 2}, "num_stages=2 and min_rank=1 weigh the ranks"),
        ({"targets": "mlp"}, "targets='mlp' must be 'all', or a list"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        LoRA(LoRAConfig(**choices))


def test_embeddings_have_no_stages(tiny_dit):
    targets = ["y_embedder.embedding_table"]
    with pytest.raises(UserError, match="cannot be had on embeddings"):
        LoRA(LoRAConfig(num_stages=2, targets=targets)).prepare(tiny_dit())


@pytest.mark.parametrize(
    "odd",
    [
        *({"rank": value} for value in ("8", 0, 2.5, True, None, 10**30)),
        *({"targets": value} for value in (5, [5], "to_q", {})),
        {"stage_gate": "cosine"},
        {"scales": ["a"]},
        {"gate_prior": "x"},
        {"another": 1},
    ],
    ids=str,
)
def test_an_odd_config_is_refused(tmp_path, odd):
    write_json(tmp_path / CONFIG_NAME, {**vars(LoRAConfig()), **odd})
    with pytest.raises(UserError, match=rf"is not of a LoRA: lora.*{next(iter(odd))}"):
        read_config(tmp_path)


def test_files_that_do_not_fit_are_refused(tiny_dit, tmp_path):
    model = tiny_dit()
    method = lora_on(model, rank=2, num_stages=3, stage_gate="learned")
    method.save(tmp_path)
    method.load(model, tmp_path)
    for choices in ({"rank": 3, "num_stages": 2}, {"rank": 2, "num_stages": 3}):
        other = tiny_dit()
        others = lora_on(other, **choices)
        with pytest.raises(UserError, match="a LoRA of other choices"):
            others.load(other, tmp_path)
    tensors = load_file(tmp_path / FILE_NAME)
    save_file({name: value for name, value in tensors.items() if "gate.bias" not in name}, tmp_path / FILE_NAME)
    with pytest.raises(UserError, match="no whole gate of its stages"):
        load_learned(tiny_dit(), tmp_path)


@pytest.mark.parametrize(
    ("choices", "changes"),
    [
        ({}, {"rank": 10**12}),
        ({"num_stages": 3}, {"num_stages": 10**12}),
        ({"num_stages": 3, "stage_gate": "table", "num_ranges": 5}, {"num_ranges": 10**12}),
    ],
)
def test_sizes_that_the_tensors_do_not_have_take_no_memory(tiny_dit, tmp_path, choices, changes):
    lora_on(tiny_dit(), rank=2, **choices).save(tmp_path)
    write_json(tmp_path / CONFIG_NAME, read_json(tmp_path / CONFIG_NAME) | changes)
    with pytest.raises(UserError, match="does not hold this LoRA, of rank"):
        load_learned(tiny_dit(), tmp_path)


def test_borders_lie_between_neighbouring_timesteps():
    """For every number of stages that divides a thousand, whatever float32 makes of the quotient."""
    for num_stages in (2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200):
        weights = StageGate(num_stages, 1, "ranges").stages(torch.arange(1000) / 1000)
        changes = [time for time, (one, other) in enumerate(pairwise(weights), 1) if not torch.equal(one, other)]
        assert changes == list(range(1000 // num_stages, 1000, 1000 // num_stages))


@pytest.mark.parametrize("family", ["DiT", "UNet2DModel", "FluxTransformer2DModel"])
def test_fused_is_unfused_in_the_base_s_own_form(family):
    tiny = FAMILIES[family]
    base = tiny.model()
    model, other = (copy.deepcopy(base, {id(value): value for value in base.parameters()}) for _ in range(2))
    names, expected_of_other = list(base.state_dict()), tiny.call(other)
    method = lora_on(model, std=0.1, rank=3)
    with torch.no_grad():
        expected = tiny.call(model)
        method.fuse()
        torch.testing.assert_close(tiny.call(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, expected_of_other, atol=1e-3)
    assert list(model.state_dict()) == names
    assert {type(module) for module in model.modules()} == {type(module) for module in base.modules()}
    assert torch.equal(tiny.call(other), expected_of_other)  # it shares the memory of what was fused into
    method.fuse()


@pytest.mark.parametrize(
    ("dtype", "choices"),
    [(torch.bfloat16, {}), (torch.float32, {"num_stages": 2}), (torch.float32, {"min_rank": 1})],
)
def test_what_fusing_would_lose_stays_an_adapter(tiny_dit, dtype, choices):
    model = tiny_dit().to(dtype)
    method = lora_on(model, rank=2, **choices)
    count = len(maps_of(model))
    method.fuse()
    assert len(maps_of(model)) == count > 0


def test_a_timestep_a_token_counts_as_the_highest_of_the_sample():
    """As Wan 2.2 TI2V tells it, whose first frame may be given and clean."""
    family = FAMILIES["WanTransformer3DModel"]
    model = family.model()
    method = LoRA(LoRAConfig(rank=2, num_stages=2, stage_gate="ranges"))
    method.prepare(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    timesteps = torch.tensor([300.0, 700.0])
    tokens = timesteps.unsqueeze(1).expand(2, FRAMES * 4 * 4).clone()
    whole = family.call(model, timestep=timesteps)
    torch.testing.assert_close(family.call(model, timestep=tokens), whole)
    weights = method.ranks.weights
    tokens[:, : 4 * 4] = 0.0
    family.call(model, timestep=tokens)
    assert torch.equal(method.ranks.weights, weights)
    assert weights.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
