"""Living with torch: compile, gradient checkpointing, autocast, half precision."""

import itertools
import shutil
from unittest.mock import Mock

import pytest
import torch

from stagepatch.families import predict
from stagepatch.patch import Patch, PatchConfig
from tests.patch.conftest import VARIANTS

# Without a C++ compiler the graph is still traced, and run as it is.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

RENORMALIZED = {"gate": "learned_keys", "selection": "hard", "hard_weight": "renormalized"}


@pytest.fixture
def compiled():
    """torch.compile with fullgraph=True, forgetting what other tests compiled."""
    torch.compiler.reset()
    yield lambda model, backend: torch.compile(model, fullgraph=True, backend=backend)
    torch.compiler.reset()


@pytest.mark.parametrize("choices", [{}, {"num_experts": 2}, {"preset": "released"}], ids=str)
def test_compiled_model_with_a_patch_equals_eager(tiny_dit, batch, make_patch, compiled, choices):
    model = tiny_dit(num_layers=2)
    base = predict(model, *batch)
    patch = make_patch(model, **choices)
    patch.attach(model)
    fast = compiled(model, BACKEND)
    with torch.no_grad():
        assert (predict(model, *batch) - base).abs().max() > 0.1
        for _ in range(2):
            torch.testing.assert_close(predict(fast, *batch), predict(model, *batch), rtol=1e-4, atol=1e-4)
            for parameter in patch.parameters():
                parameter.mul_(-0.5)


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_compiled_training_step_has_the_gradients_of_eager(tiny_dit, batch, make_patch, compiled, choices):
    model = tiny_dit(num_layers=2)
    patch = make_patch(model, **choices).train()
    patch.attach(model)
    gradients = []
    for each in (model, compiled(model, "aot_eager")):
        torch.manual_seed(0)
        patch.zero_grad()
        (predict(each, *batch).square().mean() + patch.balance_loss()).backward()
        gradients.append([parameter.grad.clone() for parameter in patch.parameters()])
    for eager, fast in zip(*gradients, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)


def test_compiled_model_follows_every_change_of_the_patch(tiny_dit, batch, make_patch, compiled):
    model = tiny_dit(num_layers=2)
    fast = compiled(model, "eager")
    patch, second = make_patch(model), make_patch(model, seed=2, condition="t+c")
    seen, handles = [], {}

    def attach(patch):
        handles[patch] = patch.attach(model)

    changes = [
        lambda: None,  # compiled before any patch
        lambda: attach(patch),
        lambda: patch.prompts[0].mul_(2),
        lambda: patch.gate.weight.neg_(),
        lambda: setattr(patch, "scale", 0.5),
        lambda: attach(second),
        lambda: handles[patch].detach(),
        lambda: handles[second].detach(),
        lambda: attach(patch),
        lambda: setattr(patch, "enabled", False),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            seen.append(predict(fast, *batch))
            torch.testing.assert_close(seen[-1], predict(model, *batch))
    assert torch.equal(seen[7], seen[0])
    assert torch.equal(seen[9], seen[0])
    assert torch.equal(seen[8], seen[4])
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(seen[:7], 2))


def test_sweeping_the_scale_does_not_compile_anew_for_every_value(tiny_dit, batch, make_patch, compiled):
    model = tiny_dit(num_layers=1)
    patch = make_patch(model)
    patch.attach(model)
    graphs = []
    fast = compiled(model, lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for step in range(10):
            patch.scale = 0.15 * step
            torch.testing.assert_close(predict(fast, *batch), predict(model, *batch))
    assert len(graphs) <= 2


def test_compiled_pipeline_can_be_patched(tiny_dit, batch, make_patch, compiled):
    model = tiny_dit(num_layers=2)
    fast = compiled(model, "eager")
    patch = make_patch(fast)
    with torch.no_grad():
        base = predict(fast, *batch)
        with patch.attach(fast):
            patched = predict(fast, *batch)
            assert torch.equal(patched, predict(model, *batch))
        assert not torch.equal(patched, base)
        assert torch.equal(predict(fast, *batch), base)


@pytest.mark.parametrize("choices", [*VARIANTS, RENORMALIZED], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(model, batch, make_patch, monkeypatch, choices):
    patch = make_patch(model, **choices).train()
    patch.attach(model)
    calls = {name: Mock(wraps=getattr(patch, name)) for name in ("enter", "observe")}
    for name, method in calls.items():
        monkeypatch.setattr(patch, name, method)

    def gradients(loss):
        return torch.autograd.grad(loss, list(patch.parameters()), allow_unused=True)

    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        for method in calls.values():
            method.reset_mock()
        total = predict(model, *batch).square().mean() + patch.balance_loss()
        results.append([total.detach(), *gradients(total)])
        # The blocks are run again in the backward, the gate is not.
        entered = 0 if patch.config.is_gated_prepending else 3
        expected = {"enter": entered * (2 if checkpointing else 1), "observe": 1}
        assert {name: method.call_count for name, method in calls.items()} == expected
        torch.manual_seed(0)
        predict(model, *batch)
        if patch.last is not None:
            results[-1] += gradients(patch.balance_loss())
    for plain, again in zip(*results, strict=True):
        assert plain is again is None or torch.equal(plain, again)


@pytest.mark.parametrize("choices", [{}, {"num_experts": 2}, {"position": "prepend"}, {"gate": "none"}], ids=str)
def test_autocast_is_close_to_float32_and_keeps_the_gate_in_float32(model, batch, make_patch, choices):
    patch = make_patch(model, condition="t+c", **choices)
    patch.attach(model)
    with torch.no_grad():
        expected = predict(model, *batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = predict(model, *batch)
            seen = model.t_embedder(batch[1]) + model.y_embedder(batch[2])
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.03 * expected.norm()
    if patch.gate is not None:
        last = patch.last
        assert last.logits.dtype == last.weights.dtype == torch.float32
        assert torch.equal(last.logits, patch.gate(seen.float()))
        assert torch.equal(last.weights, last.logits.softmax(-1))


@pytest.mark.parametrize("choices", [{}, {"num_experts": 3}, {"gate": "none"}, {"preset": "released"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fresh_patch_changes_no_bit_in_lower_precision(model, batch, dtype, choices):
    """Of a model in half precision, or of one in float32 under autocast."""
    patch = Patch.create(model.to(dtype), PatchConfig(**choices))
    inputs = batch[0].to(dtype), *batch[1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        base = predict(model, *inputs)
        patch.attach(model)
        assert torch.equal(predict(model, *inputs), base)


@pytest.mark.parametrize("choices", [{}, {"num_experts": 2}, {"position": "prepend", "num_experts": 2}], ids=str)
def test_mixture_under_autocast_is_computed_in_the_patchs_own_precision(choices, used_patch):
    patch = used_patch(**choices)
    hidden_states = torch.randn(4, 16, 32)
    expected = patch.enter(0, hidden_states)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = patch.enter(0, hidden_states)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


def test_autocast_training_step_gives_float32_gradients(model, batch, make_patch):
    patch = make_patch(model, preset="released", load_loss="surrogate").train()
    patch.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = predict(model, *batch).float().square().mean() + patch.balance_loss()
    loss.backward()
    for parameter in patch.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    "choices", [{}, {"num_experts": 2}, {"position": "prepend", "prepending": "plain"}, {"gate": "none"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_model_takes_a_float32_patch(model, batch, make_patch, dtype, choices, patched):
    inputs = batch[0].to(dtype), *batch[1:]
    patch = make_patch(model, **choices)
    with torch.no_grad():
        expected = patched(patch)
        base = predict(model.to(dtype), *inputs)
        output = patched(patch, inputs=inputs)
    assert output.dtype == dtype
    assert all(parameter.dtype == torch.float32 for parameter in patch.parameters())
    assert patch.last is None or patch.last.weights.dtype == torch.float32
    assert (output.float() - expected).norm() < 0.03 * expected.norm()
    assert (output - base).abs().max() > 0.1
