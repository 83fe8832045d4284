"""LoRA experts at several scales under a router (TimeStep Master, arXiv 2503.07416), written out."""

import copy
import itertools
from unittest.mock import patch as replaced

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.core.errors import UserError
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.merging import assemble_loras
from stagepatch.methods import LoRA, LoRAConfig, load_learned
from stagepatch.methods.lora import ADAPTER, FILE_NAME
from stagepatch.methods.lora_router import Router
from stagepatch.methods.lora_stages import Ranks
from stagepatch.sampling import SamplingConfig, generate
from stagepatch.training import Run, TrainConfig
from tests.runs import draw_weights
from tests.tiny import FAMILIES

SCALES, RANK = [4, 2, 1], 2
KINDS = ("router", "time_router")
ROUTED = {"rank": RANK, "scales": SCALES, "stage_gate": "router"}


def routed_on(model, gate_std=1.0, std=0.3, **choices):
    """A LoRA whose experts and router are drawn."""
    method = LoRA(LoRAConfig(**{**ROUTED, **choices}))
    method.prepare(model)
    draw_weights([value for name, value in model.named_parameters() if ".lora_" in name], std)
    draw_weights(method.gate.parameters(), gate_std, seed=2)
    return method


def adapted(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def expert_of(layer, number):
    """A [r, in] and B [out, r] of an expert, in float64."""
    own = slice(RANK * number, RANK * number + RANK)
    return layer.lora_A[ADAPTER].weight.double()[own], layer.lora_B[ADAPTER].weight.double()[:, own]


def experts_at(time):
    """Numbers of core and contexts at a timestep of 0…999: of each scale the ⌈(t + 1)/T·n⌉-th (Eq. 7, t from 1)."""
    offsets = itertools.accumulate([0, *SCALES[:-1]])
    return [offset + -(-(time + 1) * count // 1000) - 1 for offset, count in zip(offsets, SCALES, strict=True)]


def gates_at(router, number, time, x):
    """G of a layer for one sample, in float64: [N, scales − 1]."""
    gates = router.times[number, time].double().expand(len(x), -1)
    if router.inputs:
        layer = router.inputs[number]
        gates = gates + x @ layer.weight.double().T + layer.bias.double()
    return gates


@pytest.fixture
def merges():
    """The layers whose weights were merged, in order."""
    seen, own = [], Ranks.merged_weight
    with replaced.object(Ranks, "merged_weight", lambda ranks, layer: seen.append(layer) or own(ranks, layer)):
        yield seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_base_plus_core_plus_gated_contexts(tiny_dit, batch, kind):
    """Eq. 5–7 by hand in float64, in every layer, for samples of different timesteps, and where all are of one."""
    sample, timesteps, labels = batch
    model = tiny_dit()
    router = routed_on(model, stage_gate=kind, targets="all").gate
    seen = {}
    for layer in adapted(model):
        layer.register_forward_hook(lambda module, args, output: seen.update({module: (args[0], output)}))

    def check(timesteps):
        for number, layer in enumerate(adapted(model)):
            x, output = (value.detach().double() for value in seen[layer])
            expected = x @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
            for row, time in enumerate(timesteps.tolist()):
                tokens = x[row].view(-1, x.shape[-1])
                gates = gates_at(router, number, time, tokens)
                core, *contexts = (expert_of(layer, expert) for expert in experts_at(time))
                change = tokens @ core[0].T @ core[1].T
                for scale, (a, b) in enumerate(contexts):
                    change = change + gates[:, scale, None] * (tokens @ a.T @ b.T)
                expected[row] += change.view_as(expected[row])
            error = (output - expected).abs().max() / expected.abs().max()
            assert error < 1e-5

    for times in (timesteps, torch.tensor([0, 249, 250, 500]), torch.tensor([749, 750, 751, 499])):
        predict(model, sample, times, labels)
        check(times)
    with torch.no_grad():
        predict(model, sample, torch.full((4,), 260), labels)
    check(torch.full((4,), 260))


def test_each_scale_has_one_expert_on_at_every_timestep():
    router = Router([], 1, [8, 4, 2, 1], 3)
    on = router.are_on(torch.arange(1000) / 1000)
    assert on.shape == (1000, 15)
    offset = 0
    for count in (8, 4, 2, 1):
        part = on[:, offset : offset + count]
        assert torch.equal(part.sum(dim=1), torch.ones(1000, dtype=torch.long))
        assert torch.equal(part.argmax(dim=1), torch.arange(1000) * count // 1000)
        offset += count
    assert router.are_on(torch.tensor([1.0])).nonzero()[:, 1].tolist() == [7, 11, 13, 14]


def test_the_router_has_the_gradients_of_finite_differences():
    torch.manual_seed(0)
    router = Router([5], 1, [2, 1], 2).double()
    draw_weights(router.parameters())
    levels = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    x, direction = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((4, 5), (4, 6)))

    def loss(*parameters):  # the router's own
        gates = router(levels)[:, 0, None] + router.input_gates(0, x)
        return (router.ranks(gates, router.are_on(levels)[:, None]) * direction).sum()

    assert torch.autograd.gradcheck(loss, tuple(router.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_router_alone_and_only_rows_that_were_drawn(tiny_dit, batch, kind):
    model = tiny_dit()
    method = LoRA(LoRAConfig(**{**ROUTED, "stage_gate": kind, "gate_learning_rate_factor": 3.0}))
    (group,) = method.prepare(model)
    assert (group["params"], group["factor"]) == (list(method.gate.parameters()), 3.0)
    draw_weights([value for name, value in model.named_parameters() if ".lora_" in name])
    predict(model, *batch).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in method.gate.parameters())
    rows = method.gate.times.grad.abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    assert rows == batch[1].tolist()


@pytest.mark.parametrize("time", [0, 249, 250, 999])
def test_a_router_that_is_one_hot_is_that_expert_alone_bit_for_bit(tiny_dit, batch, time):
    """Merged: the core where gates are zero; up to rounding, a context where its gate is 1 and the core is zero."""
    sample, _, labels = batch
    timesteps = torch.full((4,), time)
    for scale in (0, 1, 2):
        model = tiny_dit()
        method = routed_on(model, stage_gate="time_router")
        number = experts_at(time)[scale]
        with torch.no_grad():
            method.gate.times.zero_()
            if scale:
                method.gate.times[:, :, scale - 1] = 1.0
                for layer in adapted(model):
                    layer.lora_B[ADAPTER].weight[:, : RANK * SCALES[0]] = 0.0
        plain = tiny_dit()
        alone = LoRA(LoRAConfig(rank=RANK))
        alone.prepare(plain)
        alone.merge()
        for ours, theirs in zip(adapted(plain), adapted(model), strict=True):
            a, b = expert_of(theirs, number)
            ours.lora_A[ADAPTER].weight.data.copy_(a)
            ours.lora_B[ADAPTER].weight.data.copy_(b)
        with torch.no_grad():
            output, expected = (predict(each, sample, timesteps, labels) for each in (model, plain))
            error = (output - expected).abs().max()
            assert error <= (0.0 if scale == 0 else 1e-5)
            method.merge(False)
            assert (predict(model, sample, timesteps, labels) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["DiT", "UNet2DModel", "FluxTransformer2DModel"])
def test_it_is_the_plain_model_with_weights_made_by_hand(merges, family):
    """W + B₁A₁ + Σ G_j B_jA_j put into the base's own layers, at several timesteps, merged and through the maps."""
    tiny = FAMILIES[family]
    start, end = (0.0, 1.0) if family.startswith("Flux") else (0.0, 1000.0)
    model = tiny.model()
    method = routed_on(model, std=0.1, stage_gate="time_router")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for time in (120, 400, 880):
        plain = tiny.model()
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        for number, (name, layer) in enumerate(layers.items()):
            weight = layer.base_layer.weight.double()
            gates = [1.0, *method.gate.times[number, time].tolist()]
            for gate, expert in zip(gates, experts_at(time), strict=True):
                a, b = expert_of(layer, expert)
                weight = weight + gate * (b @ a)
            plain.get_submodule(name).weight.data.copy_(weight)
        timesteps = torch.full((2,), start + time / 1000 * (end - start))
        with torch.no_grad():
            expected = tiny.call(plain, timestep=timesteps)
            for merged in (False, True):
                merges.clear()
                method.merge(merged)
                output = tiny.call(model, timestep=timesteps)
                assert bool(merges) == merged
                assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_that_reads_inputs_is_never_merged_and_goes_on_in_bfloat16(merges, tiny_dit, batch):
    sample, _, labels = batch
    model = tiny_dit()
    routed_on(model, std=0.1, gate_std=0.3)
    same = torch.full((4,), 300)
    with torch.no_grad():
        expected = predict(model, sample, same, labels)
        rows = [predict(model, sample[i, None], same[i, None], labels[i, None]) for i in range(4)]
        torch.testing.assert_close(expected, torch.cat(rows), rtol=1e-4, atol=1e-5)
        model.to(torch.bfloat16)
        output = predict(model, sample.bfloat16(), same, labels)
    assert not merges
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_exactly_and_a_copy_is_apart(tiny_dit, batch, tmp_path, kind):
    model = tiny_dit()
    method = routed_on(model, stage_gate=kind)
    method.save(tmp_path)
    names = {name.split("stage_gate.")[1] for name in load_file(tmp_path / FILE_NAME) if "stage_gate" in name}
    assert ({"inputs.0.weight", "inputs.5.bias"} <= names) == (kind == "router")
    assert "times" in names
    other = tiny_dit()
    loaded = load_learned(other, tmp_path)
    assert loaded.config == method.config
    same = (batch[0], torch.full((4,), 400), batch[2])
    expected = predict(model, *batch)
    copied = copy.deepcopy(model)  # after a forward that has a history
    for each in (other, copied):
        assert torch.equal(predict(each, *batch), expected)
        with torch.no_grad():
            assert torch.equal(predict(each, *same), predict(model, *same))
    with torch.no_grad():
        for parameter in method.gate.parameters():
            parameter.zero_()
    assert torch.equal(predict(copied, *batch), expected)
    assert not torch.equal(predict(model, *batch), expected)


def test_experts_side_by_side_are_each_scales_finest_until_a_router_learns(tiny_dit, batch, tmp_path):
    """Zero gates: each sample's output is that of the finest scale's LoRA whose range it is in."""
    sample, timesteps, labels = batch
    directories, models = [], []
    for number in range(7):
        model = tiny_dit()
        method = LoRA(LoRAConfig(rank=RANK))
        (group,) = method.prepare(model)
        draw_weights(group["params"], seed=number + 10)
        method.save(tmp_path / str(number))
        directories.append(tmp_path / str(number))
        models.append(model)
    config = LoRAConfig(**ROUTED)
    assemble_loras(directories, config, tiny_dit(), tmp_path / "start")
    load_learned(model := tiny_dit(), tmp_path / "start")
    output = predict(model, sample, timesteps, labels)
    for row, time in enumerate(timesteps.tolist()):
        expected = predict(models[time // 250], sample, timesteps, labels)
        torch.testing.assert_close(output[row], expected[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"LoRAs of ranks \[2, 2\] are not the 7 of rank 2 that lora scales="):
        assemble_loras(directories[:2], config, tiny_dit(), tmp_path / "other")
    with pytest.raises(UserError, match="is weighed by the noise level"):
        assemble_loras([tmp_path / "start"], config, tiny_dit(), tmp_path / "other")


def test_sampling_merges_once_a_step_and_gives_the_same_images(merges, tiny_dit):
    model = tiny_dit(learn_sigma=False)
    method = routed_on(model, std=0.1, stage_gate="time_router")
    scheduler = make_scheduler(ObjectiveConfig(), False)
    config = SamplingConfig(num_images=4, batch_size=4, num_inference_steps=5, guidance_scale=2.0)
    merged = generate(model, scheduler, config)
    assert len(merges) == 5 * 6
    method.merge(False)
    unmerged = generate(model, scheduler, config)
    assert (merged - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"scales": []}, r"scales=\[\] must be at least two numbers of experts, falling"),
        ({"scales": [8]}, r"scales=\[8\] must be at least two"),
        ({"scales": [1, 2, 4]}, r"scales=\[1, 2, 4\] must be .* falling, such as \[8, 4, 2, 1\]"),
        ({"scales": [2, 0]}, r"scales=\[2, 0\] must be"),
        ({"stage_gate": "learned"}, r"scales=\[4, 2, 1\] are a router's: set stage_gate='learned' to router"),
        ({"num_stages": 4}, "num_stages=4 is not of a router"),
        ({"min_rank": 1}, r"scales=\[4, 2, 1\] and min_rank=1 weigh the ranks"),
    ],
)
def test_routers_that_cannot_be_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        LoRA(LoRAConfig(**{**ROUTED, **choices}))


def test_convolutions_have_experts_but_no_inputs_to_read():
    tiny = FAMILIES["UNet2DModel"]
    with pytest.raises(UserError, match="reads the inputs of linear layers"):
        LoRA(LoRAConfig(**ROUTED, targets=["conv1"])).prepare(tiny.model())
    model, plain = tiny.model(), tiny.model()
    method = routed_on(model, stage_gate="time_router", targets=["conv1"])
    with torch.no_grad():
        method.gate.times.zero_()
    LoRA(LoRAConfig(rank=RANK, targets=["conv1"])).prepare(plain)
    for ours, theirs in zip(adapted(plain), adapted(model), strict=True):
        ours.lora_A[ADAPTER].weight.data.copy_(theirs.lora_A[ADAPTER].weight[:RANK])
        ours.lora_B[ADAPTER].weight.data.copy_(theirs.lora_B[ADAPTER].weight[:, :RANK])
    early, late = torch.tensor([40, 200]), torch.tensor([40, 700])
    expected = tiny.call(plain, timestep=early)
    torch.testing.assert_close(tiny.call(model, timestep=early), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny.call(model, timestep=late)[1], tiny.call(plain, timestep=late)[1], atol=1e-3)


def test_a_router_without_experts_is_not_trained(tmp_path):
    config = TrainConfig(method="lora", lora=LoRAConfig(**ROUTED), output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="`stagepatch assemble` trains both"):
        Run(config)
