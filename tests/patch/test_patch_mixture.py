"""The mixture against Eq. 3 (arXiv 2405.17825) written out, in float64."""

import math

import pytest
import torch
from torch import nn

from stagepatch.families import predict
from stagepatch.patch import PatchConfig
from stagepatch.patch.gate import LinearGate
from stagepatch.patch.mixture import hard_weights, mix, soft_weights

CHOICES = [
    {},
    {"scale": 0.5},
    {"scale": -2.0, "num_experts": 2},
    {"condition": "t+c"},
    {"block_index": False},
    {"sites": "half"},
    {"sites": ["blocks.2", "blocks.1"]},
    {"selection": "hard", "top_k": 5, "hard_weight": "one"},
    {"selection": "hard", "top_k": 0.5, "hard_weight": "renormalized"},
    {"num_experts": 2},
    {"num_experts": 3, "condition": "t+c", "selection": "hard", "top_k": 2, "hard_weight": "renormalized"},
    {"gate": "none"},
    {"gate": "attention"},
    {"gate": "attention", "condition": "t+c", "sites": ["blocks.2", "blocks.1"], "scale": 0.5},
    {"gate": "learned_keys"},
    {"gate": "learned_keys", "block_index": False, "num_experts": 3, "condition": "t+c"},
    {"preset": "released"},
    {"position": "prepend", "prepending": "plain", "num_prompts": 5},
    {"position": "prepend", "prepending": "plain", "num_prompts": 5, "condition": "t+c", "scale": 0.5},
    {"position": "prepend", "prepending": "plain", "num_prompts": 5, "gate": "none"},
    {"position": "prepend", "prepending": "plain", "num_prompts": 5, "selection": "hard", "top_k": 2},
    {"position": "prepend", "prepending": "plain", "num_prompts": 5, "num_experts": 3, "gate": "learned_keys"},
]


def naive_forward(model, patch, sample, timesteps, labels, scale):
    """The DiT's blocks one by one, each with its mixture: one sample and one prompt at a time."""
    t, y = model.t_embedder(timesteps), model.y_embedder(labels)
    seen = t + y if patch.config.condition == "t+c" else t
    prompts = {site.index: prompt for site, prompt in zip(patch.backbone.sites, patch.prompts, strict=True)}
    hidden_states = model.x_embedder(sample) + model.positions
    for index, block in enumerate(model.blocks):
        if index not in prompts:
            hidden_states = block(hidden_states, t + y, (4, 4))
            continue
        mixed = torch.stack([scale * naive_mixture(patch, row, index, prompts[index]) for row in seen])
        if patch.config.position == "add":
            hidden_states = block(hidden_states + mixed, t + y, (4, 4))
        else:
            hidden_states = block(torch.cat([mixed, hidden_states], dim=1), t + y, (4, 4))[:, mixed.shape[1] :]
    return model._unpatchify(model.final_layer(hidden_states, t + y), (4, 4))


def naive_mixture(patch, condition, index, prompts):
    if patch.gate is None:
        return prompts
    if patch.config.gate == "attention":
        return torch.stack([naive_attention(patch.gate, condition, index, prompt) for prompt in prompts])
    weights = naive_weights(patch, naive_logits(patch, condition, index))
    if patch.config.num_experts > 1:
        return sum(weights[k] * prompts[k] for k in range(len(weights)))
    return torch.stack([weights[n] * prompts[n] for n in range(len(weights))])


def naive_attention(gate, condition, index, prompt):
    """Table 4a: the prompt is the query; the timestep, and the block's index as a sinusoid, are keys and values."""
    half = len(condition) // 2
    phases = torch.tensor([index * 10000 ** (-j / half) for j in range(half)], dtype=torch.float64)
    block = gate.indices[gate.indices.sub(torch.cat([phases.sin(), phases.cos()])).abs().amax(1) < 1e-6]  # in float32
    sources = [condition, *block]
    assert len(sources) == 2
    query = gate.query @ prompt
    logits = [float(query @ (gate.key @ source)) / math.sqrt(len(query)) for source in sources]
    total = sum(math.exp(logit) for logit in logits)
    return sum(math.exp(logit) / total * (gate.value @ source) for logit, source in zip(logits, sources, strict=True))


def naive_logits(patch, condition, index):
    features = condition
    if patch.config.block_index:
        features = torch.cat([condition, torch.tensor([float(index)], dtype=condition.dtype)])
    if patch.config.gate == "linear":
        return [float(row @ features + bias) for row, bias in zip(patch.gate.weight, patch.gate.bias, strict=True)]
    query = patch.gate.query_weight @ features
    return [float(key @ query) / math.sqrt(len(query)) for key in patch.gate.keys]


def naive_weights(patch, logits):
    config = patch.config
    chosen = range(len(logits))
    if config.selection == "hard":
        k = config.top_k if config.top_k >= 1 else round(config.top_k * len(logits))
        chosen = sorted(chosen, key=lambda n: logits[n])[-k:]
        if config.hard_weight == "one":
            return [float(n in chosen) for n in range(len(logits))]
    total = sum(math.exp(logits[n]) for n in chosen)
    return [math.exp(logit) / total if n in chosen else 0.0 for n, logit in enumerate(logits)]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_patched_model_equals_equation_3_written_out(tiny_dit, batch, make_patch, choices):
    scale = choices.get("scale", 1.0)
    model = tiny_dit().double()
    sample, timesteps, labels = batch
    inputs = sample.double(), timesteps, labels
    patch = make_patch(model, **{name: value for name, value in choices.items() if name != "scale"}).double()
    for parameter in () if patch.gate is None else patch.gate.parameters():
        parameter.data *= 0.3  # weights neither equal nor one-hot
    patch.scale = scale
    with torch.no_grad():
        base = predict(model, *inputs)
        expected = naive_forward(model, patch, *inputs, scale)
        with patch.attach(model):
            output = predict(model, *inputs)
    assert (base - expected).abs().max() > 1e-3
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)


def test_naive_forward_without_prompts_is_the_model(model, batch, make_patch):
    with torch.no_grad():
        plain = naive_forward(model, make_patch(model), *batch, 0.0)
    torch.testing.assert_close(plain, predict(model, *batch))


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"condition": "t+c", "block_index": False},
        {"num_experts": 3},
        {"gate": "attention"},
        {"gate": "learned_keys"},
        {"gate": "none"},
        {"position": "prepend", "num_prompts": 3},
        {"position": "prepend", "num_prompts": 3, "num_experts": 2},
        {"position": "prepend", "num_prompts": 3, "prepending": "plain"},
        {"selection": "hard", "top_k": 2, "hard_weight": "renormalized"},
    ],
    ids=str,
)
def test_gradients_of_everything_learned_pass_gradcheck(tiny_dit, make_patch, choices):
    model = tiny_dit(sample_size=4, hidden_size=4, num_layers=2, num_attention_heads=1).double()
    patch = make_patch(model, **choices).double()
    patch.attach(model)
    both = nn.ModuleDict({"model": model, "patch": patch})
    both.forward = lambda *inputs: predict(model, *inputs)
    names = [name for name, _ in patch.named_parameters()]
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    inputs = sample, torch.tensor([40, 700]), torch.tensor([1, 2])

    def output(*values):
        named = {f"patch.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(both, named, inputs)

    values = [parameter.detach().clone().requires_grad_() for parameter in patch.parameters()]
    assert torch.autograd.gradcheck(output, values)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(output(*values).square().sum(), values))


def test_noise_weight_gets_its_gradient(model, make_patch, patched):
    patch = make_patch(model, gate_noise=True).train()
    patched(patch).square().mean().backward()
    assert patch.gate.noise_weight.grad.abs().max() > 0


def test_hard_selection_with_weight_one_passes_the_softmaxs_gradient_straight_through():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    hard = hard_weights(logits, 2, "one")
    assert set(hard.flatten().tolist()) == {0.0, 1.0}
    assert (hard.sum(-1) == 2).all()
    (given,) = torch.autograd.grad((hard * direction).sum(), logits)
    (expected,) = torch.autograd.grad((soft_weights(logits) * direction).sum(), logits)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_renormalized_weights_of_numbers_written_out():
    logits = torch.tensor([[[0.0, math.log(3.0), -1.0, math.log(2.0)]]])
    weights = hard_weights(logits, 2, "renormalized")
    torch.testing.assert_close(weights, torch.tensor([[[0.0, 0.6, 0.0, 0.4]]]))


def test_mixture_without_weights_is_the_prompts_once():
    prompts = torch.randn(3, 2)
    assert torch.equal(mix(prompts, None), prompts[None])


def test_gate_multiplies_once_for_all_blocks(monkeypatch):
    gate = LinearGate(PatchConfig(gate_initialization="normal"), 8, 5, list(range(12)))
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    assert gate(torch.randn(3, 8)).shape == (12, 3, 5)
    assert len(calls) == 1
