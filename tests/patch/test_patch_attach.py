import copy
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.families import Extent, predict
from stagepatch.patch import Patch, PatchConfig

GATES = [("linear", 1), ("linear", 3), ("learned_keys", 1), ("learned_keys", 3), ("none", 1)]
SELECTIONS = [
    {"selection": "soft"},
    {"selection": "hard", "hard_weight": "one"},
    {"selection": "hard", "hard_weight": "renormalized", "top_k": 2},
]
ADD_CHOICES = [
    {"preset": preset, "gate": gate, "num_experts": experts, **selection}
    for preset, (gate, experts), selection in itertools.product(("paper", "released"), GATES, SELECTIONS)
]
ADD_CHOICES += [{"condition": "t+c"}, {"block_index": False}, {"sites": "first"}, {"sites": ["blocks.1"]}]
ADD_CHOICES += [{"gate_initialization": "normal"}, {"gate": "attention"}, {"gate": "attention", "condition": "t+c"}]


def hooks_on(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


@pytest.mark.parametrize("choices", ADD_CHOICES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_fresh_patch_changes_no_bit_of_the_output(model, base, batch, choices, training):
    Patch.create(model, PatchConfig(**choices)).train(training).attach(model)
    assert torch.equal(predict(model, *batch), base)


def test_creating_a_patch_does_not_touch_the_model(model, base, batch, make_patch):
    make_patch(model)
    assert hooks_on(model) == []
    assert torch.equal(predict(model, *batch), base)


@pytest.mark.parametrize(
    ("switch_off", "stays_attached"),
    [
        (lambda patch, handle: handle.detach(), False),
        (lambda patch, handle: setattr(patch, "enabled", False), True),
        (lambda patch, handle: setattr(patch, "scale", 0.0), True),
    ],
    ids=["detached", "disabled", "scale 0"],
)
@pytest.mark.parametrize(
    "choices",
    [{"condition": "t+c"}, {"position": "prepend", "condition": "t+c"}, {}, {"num_experts": 2}, {"gate": "none"}],
    ids=str,
)
def test_switched_off_is_bit_for_bit_the_base(model, base, batch, make_patch, choices, switch_off, stays_attached):
    patch = make_patch(model, **choices)
    handle = patch.attach(model)
    patched = predict(model, *batch)
    assert not torch.allclose(patched, base)
    switch_off(patch, handle)
    assert torch.equal(predict(model, *batch), base)
    assert bool(hooks_on(model)) == stays_attached
    patch.enabled, patch.scale = True, 1.0
    assert torch.equal(predict(model, *batch), patched if stays_attached else base)


def test_context_manager_detaches_at_the_end_and_after_an_error(model, base, batch, make_patch):
    patch = make_patch(model)
    with patch.attach(model) as handle:
        assert handle.patch is patch
        assert not torch.equal(predict(model, *batch), base)
    assert torch.equal(predict(model, *batch), base)
    with pytest.raises(RuntimeError, match="the user's"), patch.attach(model):
        raise RuntimeError("the user's own")
    assert torch.equal(predict(model, *batch), base)


def test_detaching_twice_does_nothing_more(model, batch, make_patch):
    patch = make_patch(model)
    first = patch.attach(model)
    first.detach()
    second = patch.attach(model)
    first.detach()
    patched = predict(model, *batch)
    second.detach()
    second.detach()
    assert not torch.equal(patched, predict(model, *batch))
    assert hooks_on(model) == []


def test_patch_stays_on_when_its_handle_is_thrown_away(model, base, batch, make_patch):
    make_patch(model).attach(model)
    gc.collect()
    assert not torch.equal(predict(model, *batch), base)


@pytest.mark.parametrize("choices", [{}, {"position": "prepend"}, {"preset": "released"}], ids=str)
def test_backbone_keeps_its_names_and_values_throughout(model, batch, make_patch, choices):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def names():
        return [[name for name, _ in named] for named in (model.named_parameters(), model.named_modules())]

    def check():
        assert list(model.state_dict()) == list(before)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        assert names() == names_before
        assert all(parameter.grad is None for parameter in model.parameters())

    names_before = names()
    patch = make_patch(model, **choices).train()
    handle = patch.attach(model)
    check()
    output = predict(model, *batch)
    check()
    (output.square().mean() + patch.balance_loss()).backward()
    assert all(parameter.grad is not None for parameter in patch.prompts)
    check()
    torch.optim.AdamW(patch.parameters(), lr=0.1).step()
    check()
    handle.detach()
    check()


def test_attaching_twice_is_refused_until_detached(model, make_patch):
    patch = make_patch(model)
    handle = patch.attach(model)
    with pytest.raises(UserError, match="attached to that model already"):
        patch.attach(model)
    handle.detach()
    patch.attach(model).detach()


def test_one_patch_serves_two_models(tiny_dit, batch, make_patch):
    first, second = tiny_dit(seed=0), tiny_dit(seed=1)
    bases = [predict(model, *batch) for model in (first, second)]
    patch = make_patch(first)

    def unchanged():
        return [torch.equal(predict(model, *batch), base) for model, base in zip((first, second), bases, strict=True)]

    patch.attach(first)
    handle = patch.attach(second)
    assert unchanged() == [False, False]
    handle.detach()
    assert unchanged() == [False, True]


def test_new_model_at_a_freed_models_address_is_not_taken_for_it(tiny_dit, make_patch):
    patch = make_patch(tiny_dit())
    for _ in range(5):
        patch.attach(tiny_dit())


def test_two_patches_at_once_add_up(tiny_dit, batch, make_patch):
    model = tiny_dit().double()
    inputs = batch[0].double(), *batch[1:]
    one, other, both = (make_patch(model, seed=seed, gate="none").double() for seed in (1, 2, 3))
    for summed, a, b in zip(both.prompts, one.prompts, other.prompts, strict=True):
        summed.data = a.data + b.data
    with both.attach(model):
        expected = predict(model, *inputs)
    first, second = one.attach(model), other.attach(model)
    torch.testing.assert_close(predict(model, *inputs), expected, rtol=1e-12, atol=1e-12)
    first.detach()
    left = predict(model, *inputs)
    second.detach()
    with other.attach(model):
        assert torch.equal(predict(model, *inputs), left)


def test_two_gated_patches_each_keep_their_own_mixture(model, batch, make_patch, patched):
    patches = make_patch(model, seed=1), make_patch(model, seed=2, condition="t+c", position="prepend")
    for patch in patches:
        patched(patch)
    alone = [patch.last.weights for patch in patches]
    for patch in patches:
        patch.attach(model)
    predict(model, *batch)
    assert all(torch.equal(patch.last.weights, weights) for patch, weights in zip(patches, alone, strict=True))


@pytest.mark.parametrize("name", ["transformer", "unet"])
def test_pipeline_is_patched_at_its_denoiser(model, base, batch, make_patch, name):
    pipeline = SimpleNamespace(vae=torch.nn.Identity(), **{name: model})
    with make_patch(pipeline).attach(pipeline):
        assert not torch.equal(predict(model, *batch), base)
    assert torch.equal(predict(model, *batch), base)


@pytest.mark.parametrize("target", ["a path", None, SimpleNamespace(transformer="no module"), 3], ids=str)
def test_what_is_neither_model_nor_pipeline_is_refused(tiny_dit, make_patch, target):
    patch = make_patch(tiny_dit())
    with pytest.raises(UserError, match=f"{type(target).__name__} is neither a model nor a pipeline"):
        patch.attach(target)
    with pytest.raises(UserError, match="neither a model nor a pipeline"):
        Patch.create(target)


def test_broken_description_is_named(model, make_patch):
    patch = make_patch(model)
    patch.attach(model)
    patch.extent = Extent((5, 5))
    with pytest.raises(UserError, match=r"'blocks.0' got \(16, 32\) .* image of 5 × 5 tokens and 32 channels"):
        patch.enter(0, torch.zeros(1, 16, 32))


def test_forward_that_broke_off_leaves_nothing_to_the_next(model, batch, make_patch):
    make_patch(model, condition="t+c").attach(model)
    expected = predict(model, *batch)
    with pytest.raises(UserError, match="class_labels"):
        model(*batch[:2])  # after the timestep's tap, before the label's
    assert torch.equal(predict(model, *batch), expected)


def test_copied_model_has_an_attached_patch_of_its_own(model, base, batch, make_patch):
    patch = make_patch(model, condition="t+c")
    patch.attach(model)
    patched = predict(model, *batch)  # with a graph behind patch.last
    copied, copied_patch = copy.deepcopy((model, patch))
    assert copied_patch is not patch
    assert copied_patch.last is None
    assert torch.equal(predict(copied, *batch), patched)
    for parameter in patch.parameters():
        parameter.data.zero_()
    assert torch.equal(predict(model, *batch), base)
    assert torch.equal(predict(copied, *batch), patched)
    copied_patch.enabled = False
    assert torch.equal(predict(copied, *batch), base)
    with pytest.raises(UserError, match="attached to that model already"):
        copied_patch.attach(copied)


def test_copied_model_alone_keeps_working_after_a_backward(model, batch, make_patch):
    patch = make_patch(model).train()
    patch.attach(model)
    patched = predict(model, *batch)
    patched.mean().backward()
    copied = copy.deepcopy(model)
    assert torch.equal(predict(copied, *batch), patched)
    assert [name for name, _ in copied.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_copied_patch_is_attached_to_nothing(model, base, batch, make_patch):
    patch = make_patch(model)
    with patch.attach(model):
        patched = predict(model, *batch)
        copied = copy.deepcopy(patch)
    assert copied.config == patch.config
    assert copied.config is not patch.config
    assert torch.equal(predict(model, *batch), base)
    patch.prompts[0].data.zero_()
    with copied.attach(model):
        assert torch.equal(predict(model, *batch), patched)


def test_patch_can_be_part_of_a_module_to_which_a_function_is_applied(tiny_dit, make_patch):
    patch = make_patch(tiny_dit())
    seen = []
    torch.nn.ModuleList([patch]).apply(seen.append)
    assert {patch, patch.gate} <= set(seen)
