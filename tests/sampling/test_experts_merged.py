"""LoRAs by range: merged once when a range begins, against peft's own merge of each, and never out of date."""

import copy
import weakref
from unittest.mock import patch as replaced

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel

from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.methods.lora import ADAPTER
from stagepatch.methods.lora_stages import Ranks
from stagepatch.sampling import ExpertRange, Experts, generate
from tests.runs import assert_same, draw_weights
from tests.sampling.test_experts import answer, config
from tests.sampling.test_experts_file import load, ranges
from tests.sampling.test_generate import SCHEDULER, by_hand, sampler_of

LAYERS = 3 * 5  # blocks, linear layers of each
BOUNDS = [(0, 250), (250, 500), (500, 1000)]


@pytest.fixture
def plain(tiny_dit):
    """Makes the base without anything on it."""
    return lambda: tiny_dit(learn_sigma=False).requires_grad_(False)


@pytest.fixture
def experts(plain, tmp_path):
    """A LoRA for each range."""
    for number in range(len(BOUNDS)):
        method = LoRA(LoRAConfig(rank=2, targets="all"))
        (group,) = method.prepare(plain())
        draw_weights(group["params"], 0.3, seed=number)
        method.save(tmp_path / str(number))

    def put_on(base, **content):
        entries = [each | {"learned": str(number)} for number, each in enumerate(ranges(*BOUNDS))]
        return load(tmp_path, base, experts=entries, **content)

    return put_on


@pytest.fixture
def merges():
    """The layers whose weights were merged, in order."""
    seen, own = [], Ranks.merged_weight
    with replaced.object(Ranks, "merged_weight", lambda ranks, layer: seen.append(layer) or own(ranks, layer)):
        yield seen


def by_peft(base, expert, scale=1.0):
    """The base with the expert's maps, merged into its weights by peft alone."""
    choices = peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2|1)")
    tuner = LoraModel(base, choices, "default")
    assert len(tuner.targeted_module_names) == LAYERS
    state = peft.get_peft_model_state_dict(expert, adapter_name=ADAPTER)
    peft.set_peft_model_state_dict(base, state)
    return tuner.merge_and_unload()


def layers_of(expert):
    return [part for part in expert.modules() if ADAPTER in getattr(part, "lora_A", ())]


def kept(handle):
    return [weight for weight in handle._merged._weights if weight is not None]


def close(output, expected):
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_is_peft_s_merge_of_each_range_by_hand_and_merges_once_a_range(experts, plain, merges, guidance):
    base = plain()
    found = experts(base)
    merged = [by_peft(plain(), each.denoiser) for each in found.ranges]
    labels = torch.arange(4)

    def output(x, t):
        model = merged[[t[0] < end for _, end in BOUNDS].index(True)]
        own, null = (model(x, t, each).sample for each in (labels, torch.full_like(labels, base.config.num_classes)))
        return null + guidance * (own - null)

    expected = by_hand(sampler_of("DDIM", SCHEDULER, 8), output, 4)
    with found.attach(base):
        for _ in range(2):
            merges.clear()
            close(generate(base, SCHEDULER, config(num_inference_steps=8, guidance_scale=guidance)), expected)
            assert len(merges) == len(BOUNDS) * LAYERS


def test_kept_weights_are_bit_for_bit_those_of_a_merge_in_each_forward(experts, plain, batch):
    base = plain()
    found = experts(base)
    with torch.no_grad(), found.attach(base):
        for expert, timestep in zip(found.ranges, (0, 300, 999), strict=True):
            expected = answer(expert.denoiser, batch, timestep)
            close(answer(base, batch, timestep), expected)
            # Here the modulation, with a row a sample, is cheaper through its maps: that is the only difference.
            with replaced.object(type(layers_of(expert.denoiser)[0].forward), "_is_cheaper", lambda *_: True):
                assert torch.equal(answer(base, batch, timestep), answer(expert.denoiser, batch, timestep))


def test_one_set_is_kept_and_the_base_stays_what_it_was(experts, plain, batch):
    base = plain()
    before, weights = answer(base, batch, 100), copy.deepcopy(base.state_dict())
    handle = experts(base).attach(base)
    sizes, dropped = [], []
    with torch.no_grad():
        for timestep in (900, 300, 100, 900):
            answer(base, batch, timestep)
            assert all(each() is None for each in dropped)
            sizes.append(sum(weight.numel() for weight in kept(handle)))
            dropped = [weakref.ref(weight) for weight in kept(handle)]
        layers = layers_of(handle.experts.ranges[0].denoiser)
        assert sizes == [sum(layer.base_layer.weight.numel() for layer in layers)] * 4
        assert all(layer.forward.kept is None for each in handle.experts.ranges for layer in layers_of(each.denoiser))
        handle.detach()
    assert not kept(handle)
    assert all(each() is None for each in dropped)
    assert_same(base.state_dict(), weights)
    assert torch.equal(answer(base, batch, 100), before)


def _scale(expert, base):
    for layer in layers_of(expert):
        layer.scaling[ADAPTER] = 0.5


def _a_map_in_place(expert, base):
    with torch.no_grad():
        layers_of(expert)[-1].lora_A[ADAPTER].weight.mul_(3.0)


def _another_map(expert, base):
    own = layers_of(expert)[0].lora_B[ADAPTER]
    own.weight = torch.nn.Parameter(own.weight * 2.0)


def _loaded(expert, base):
    expert.load_state_dict({name: value * 1.1 for name, value in expert.state_dict().items()})


def _the_base_in_place(expert, base):
    base.load_state_dict({name: value * 1.1 for name, value in base.state_dict().items()})


def _rounded(expert, base):
    for layer in layers_of(expert):
        layer.half().float()


CHANGES = [_scale, _a_map_in_place, _another_map, _loaded, _the_base_in_place, _rounded]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_changes_is_seen_at_the_next_call(experts, plain, batch, merges, change):
    base = plain()
    found = experts(base)
    expert = found.ranges[1].denoiser
    with torch.no_grad(), found.attach(base):
        before = answer(base, batch, 300)
        answer(base, batch, 300)
        assert len(merges) == LAYERS
        change(expert, base)
        after = answer(base, batch, 300)
        assert len(merges) == 2 * LAYERS
        own = plain()
        names = {name: name.replace(".base_layer", "") for name in expert.state_dict() if ".lora_" not in name}
        own.load_state_dict({names[name]: value for name, value in expert.state_dict().items() if name in names})
        close(after, answer(by_peft(own, expert, 0.5 if change is _scale else 1.0), batch, 300))
        assert not torch.allclose(after, before, rtol=1e-5, atol=1e-6)


def test_from_range_to_range_and_back(experts, plain, batch):
    base = plain()
    found = experts(base)
    merged = {low: by_peft(plain(), each.denoiser) for (low, _), each in zip(BOUNDS, found.ranges, strict=True)}
    with torch.no_grad(), found.attach(base):
        for low in (0, 500, 0, 250, 0, 0):
            close(answer(base, batch, low), answer(merged[low], batch, low))


def test_adapters_that_are_switched_off_are_off(experts, plain, batch):
    base = plain()
    expected, found = answer(base, batch, 300), experts(base)
    with torch.no_grad(), found.attach(base):
        changed = answer(base, batch, 300)
        for layer in layers_of(found.ranges[1].denoiser):
            layer.enable_adapters(False)
        assert torch.equal(answer(base, batch, 300), expected)
        for layer in layers_of(found.ranges[1].denoiser):
            layer.enable_adapters(True)
        assert torch.equal(answer(base, batch, 300), changed)


def test_rows_of_several_ranges_have_each_its_own(experts, plain, batch, merges):
    base, timesteps = plain(), torch.tensor([900, 300, 320, 10])
    found = experts(base)
    rows = [[time < end for _, end in BOUNDS].index(True) for time in timesteps.tolist()]
    merged = [by_peft(plain(), found.ranges[row].denoiser) for row in rows]
    expected = torch.cat([answer(model, batch, timesteps)[row, None] for row, model in enumerate(merged)])
    with torch.no_grad(), found.attach(base):
        answer(base, batch, 300)
        merges.clear()
        close(answer(base, batch, timesteps), expected)
        assert not {id(layer) for layer in merges} & {id(layer) for layer in layers_of(found.ranges[1].denoiser)}


def test_with_gradients_the_maps_are_run(experts, plain, batch, merges):
    base = plain()
    found = experts(base)
    maps = [layer.lora_B[ADAPTER].weight.requires_grad_(True) for layer in layers_of(found.ranges[1].denoiser)]
    expected = torch.autograd.grad(answer(found.ranges[1].denoiser, batch, 300).square().sum(), maps)
    with found.attach(base):
        with torch.no_grad():
            answer(base, batch, 300)
        merges.clear()
        gradients = torch.autograd.grad(answer(base, batch, 300).square().sum(), maps)
    assert not merges
    assert all(torch.equal(*each) for each in zip(gradients, expected, strict=True))


def test_a_copy_of_the_model_is_apart(experts, plain, batch):
    base = plain()
    found = experts(base)
    with torch.no_grad(), found.attach(base):
        before = answer(base, batch, 300)
        copied = copy.deepcopy(base)
        assert torch.equal(answer(copied, batch, 300), before)
        _a_map_in_place(copied.forward.experts.ranges[1].denoiser, copied)
        assert not torch.allclose(answer(copied, batch, 300), before)
        assert torch.equal(answer(base, batch, 300), before)


def test_weights_made_in_inference_mode_are_merged_each_time(plain, batch):
    """Torch keeps no count of their changes."""
    base = plain()
    with torch.inference_mode():
        expert = plain()
        method = LoRA(LoRAConfig(rank=2, targets="all"))
        (group,) = method.prepare(expert)
        draw_weights(group["params"], 0.3)
        method.merge()
        with Experts([ExpertRange(0, 1000, expert)]).attach(base):
            for _ in range(2):
                close(answer(base, batch, 300), answer(by_peft(plain(), expert), batch, 300))
                layers_of(expert)[0].lora_A[ADAPTER].weight.mul_(2.0)


def test_two_ranges_at_once_keep_nothing(experts, plain, batch):
    base, other = plain(), plain()
    found = experts(base)
    denoisers = [each.denoiser for each in found.ranges]
    both = [ExpertRange(0, 1000, denoisers[0]), ExpertRange(0, 500, denoisers[1])]
    with torch.no_grad():
        with Experts(both, fuse="maxfusion").attach(other):
            expected = answer(other, batch, 300)
        with Experts(both, fuse="maxfusion").attach(base) as handle:
            answer(base, batch, 900)
            assert len(kept(handle)) == LAYERS
            assert torch.equal(answer(base, batch, 300), expected)
            assert not kept(handle)


def test_compiled_experts_take_weights_that_were_made_anew(experts, plain, batch):
    base = plain()
    found = experts(base)
    merged = [by_peft(plain(), each.denoiser) for each in found.ranges]
    found.ranges[0].denoiser.compile(backend="eager")
    with torch.no_grad(), found.attach(base):
        for timestep, model in ((100, merged[0]), (300, merged[1]), (100, merged[0])):
            close(answer(base, batch, timestep), answer(model, batch, timestep))
        _scale(found.ranges[0].denoiser, base)
        close(answer(base, batch, 100), answer(by_peft(plain(), found.ranges[0].denoiser, 0.5), batch, 100))
