"""A gate's activation, biases and entropy against closed forms, for every kind of patch and family of models."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from stagepatch.analysis import (
    analyze_gate,
    choice_grid,
    gate_activation,
    plot_spatial_bias,
    spatial_bias,
    temporal_bias,
)
from stagepatch.core import UserError
from stagepatch.families import find_denoiser, predict, text_channels
from stagepatch.families.registry import family_of
from stagepatch.patch import Patch, PatchConfig, gate_entropy
from tests.runs import draw_weights
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES

TIMESTEPS = torch.tensor([0, 300, 650, 999])
PROMPTED = [
    name
    for name, tiny in PIPELINES.items()
    if tiny.is_prompted
    and tiny.is_trained
    and not name.startswith(("HiDream", "WanVACE", "UNet2DConditionModel of Kandinsky", "GlmImage"))
]


def patch_for(model, std=0.3, **choices):
    patch = Patch.create(model, PatchConfig(**choices))
    draw_weights(patch.gate.parameters(), std)
    return patch


def full_forward(model, patch, sample, condition):
    """The weights of a forward that runs all blocks."""
    patch.last = None
    with torch.no_grad():
        predict(model, sample, TIMESTEPS, condition)
    return patch.last.weights


def test_logits_by_hand_are_the_softmax_of_them(tiny_dit):
    model = tiny_dit()
    patch = patch_for(model, std=0.0)
    shares = torch.arange(1.0, 17.0) / 136
    patch.gate.bias.data = shares.log()
    with patch.attach(model):
        weights = gate_activation(model, patch, TIMESTEPS)
    torch.testing.assert_close(weights, shares.expand(3, 4, 16))
    torch.testing.assert_close(temporal_bias(weights), torch.full((3, 4), 1 / 16))
    torch.testing.assert_close(spatial_bias(weights, choice_grid(patch)), shares.view(4, 4).expand(3, 4, 4))
    expected = torch.full((3, 4), float(scipy.stats.entropy(shares.numpy())))
    torch.testing.assert_close(gate_entropy(weights), expected)


def test_timestep_and_block_come_as_equation_3_says(tiny_dit):
    model = tiny_dit()
    patch = patch_for(model)
    with patch.attach(model):
        weights = gate_activation(model, patch, TIMESTEPS, batch_size=3)
    embedding = model.t_embedder(TIMESTEPS).double().numpy()
    weight, bias = (value.detach().double().numpy() for value in (patch.gate.weight, patch.gate.bias))
    for index, of_block in enumerate(weights):
        inputs = np.concatenate([embedding, np.full((4, 1), index)], axis=1)
        expected = scipy.special.softmax(inputs @ weight.T + bias, axis=1)
        np.testing.assert_allclose(of_block.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT", "DiTTransformer2DModel", "UNet2DModel"])
@pytest.mark.parametrize("condition", ["t", "t+c"])
def test_a_gate_at_zero_is_uniform_and_another_is_that_of_the_whole_forward(name, condition):
    family = FAMILIES[name]
    model = family.model()
    patch = Patch.create(model, PatchConfig(condition=condition))
    with patch.attach(model):
        weights = gate_activation(model, patch, TIMESTEPS)
        assert weights.shape == (family.blocks, 4, math.prod(patch.gate_grid))
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / patch.num_choices))
        torch.testing.assert_close(gate_entropy(weights).exp(), torch.full(weights.shape[:2], 1.0 * patch.num_choices))
        draw_weights(patch.gate.parameters())
        found = gate_activation(model, patch, TIMESTEPS, condition=3)
        expected = full_forward(model, patch, torch.randn(4, 4, 8, 8), torch.full((4,), 3))
    torch.testing.assert_close(found, expected)
    assert found[0, 0].std() > 0.001


@pytest.mark.parametrize("name", PROMPTED)
def test_every_model_of_text_is_asked_with_its_caption(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    model = find_denoiser(pipe)
    encode = family_of(type(model)).encode_captions
    one, other = (encode(pipe, [caption]) for caption in ("a cat", "a small red house"))
    sees_text = bool(text_channels(model))
    patch = patch_for(model, condition="t+text" if sees_text else "t", sample_size=tiny.sample_size)
    shape = (16 if name.startswith("LongCat") else tiny.changes.get("in_channels", 4), *FAMILIES[name].size)
    with patch.attach(model):
        weights = gate_activation(model, patch, TIMESTEPS, one, shape=shape)
        rows = {key: value.expand(4, *value.shape[1:]) for key, value in one.items()}
        expected = full_forward(model, patch, torch.randn(4, *shape), rows)
        assert sees_text != torch.equal(weights, gate_activation(model, patch, TIMESTEPS, other, shape=shape))
    torch.testing.assert_close(weights, expected)
    with patch.attach(model), pytest.raises(UserError, match="the model takes text"):
        gate_activation(model, patch, TIMESTEPS)


def test_blocks_do_not_run_and_nothing_is_left_on_the_model(tiny_dit):
    model = tiny_dit()
    ran, done = [], []
    model.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    patch = patch_for(model, gate_noise=True).train()
    with patch.attach(model):
        hooks = len(model.blocks[0]._forward_pre_hooks)
        first, second = (gate_activation(model, patch, TIMESTEPS, batch_size=3, on_batch=done.append) for _ in "ab")
        assert len(model.blocks[0]._forward_pre_hooks) == hooks
        assert not ran
        predict(model, torch.zeros(1, 1, 8, 8), TIMESTEPS[:1], torch.tensor([0]))
        assert ran
    assert torch.equal(first, second)  # without the gate's noise
    assert done == [3, 1, 3, 1]


@pytest.mark.parametrize(
    ("choices", "grid", "total"),
    [
        ({}, (4, 4), 1),
        ({"normalization": "mean_one"}, (4, 4), 16),
        ({"grid": [2, 2]}, (2, 2), 1),
        ({"selection": "hard", "top_k": 5}, (4, 4), 5),
        ({"selection": "hard", "top_k": 5, "hard_weight": "renormalized"}, (4, 4), 1),
        ({"num_experts": 3}, (1, 3), 1),
        ({"position": "prepend", "num_prompts": 5}, (1, 5), 1),
        ({"position": "prepend", "num_prompts": 5, "prepending": "plain"}, (1, 5), 1),
        ({"gate": "learned_keys", "sites": ["blocks.2"]}, (4, 4), 1),
    ],
)
def test_activation_is_what_multiplies_the_prompts(tiny_dit, choices, grid, total):
    model = tiny_dit()
    patch = patch_for(model, **choices)
    with patch.attach(model):
        activation, temporal, spatial = analyze_gate(model, patch, TIMESTEPS)
    weights = activation.tensors["activation"]
    torch.testing.assert_close(weights.sum(dim=2), torch.full(weights.shape[:2], float(total)))
    torch.testing.assert_close(temporal.numbers["mean_activation"], weights.mean(dim=2))
    assert spatial.numbers["grid"] == list(grid)
    assert spatial.numbers["mean_activation"].shape == (len(patch.backbone.sites), *grid)
    if choices.get("hard_weight", "one") == "one" and choices.get("selection") == "hard":
        effective = temporal.numbers["effective_prompts"]
        torch.testing.assert_close(effective, torch.full_like(effective, 5.0))


def test_conditions_are_averaged_and_entropies_too(tiny_dit):
    model = tiny_dit()
    patch = patch_for(model, condition="t+c")
    with patch.attach(model):
        each = [gate_activation(model, patch, TIMESTEPS, label) for label in (2, 7)]
        activation, temporal, _ = analyze_gate(model, patch, TIMESTEPS, [2, 7])
    assert not torch.allclose(*each)
    torch.testing.assert_close(activation.tensors["activation"], (each[0] + each[1]) / 2)
    entropies = [scipy.stats.entropy(weights.double().numpy(), axis=2) for weights in each]
    np.testing.assert_allclose(temporal.numbers["entropy"].numpy(), np.mean(entropies, axis=0), rtol=1e-5)


@pytest.mark.parametrize("gate", ["none", "attention"])
def test_a_patch_without_weights_is_refused(tiny_dit, gate):
    model = tiny_dit()
    patch = Patch.create(model, PatchConfig(gate=gate))
    with patch.attach(model), pytest.raises(UserError, match="no weights over its prompts"):
        gate_activation(model, patch, TIMESTEPS)


def test_a_patch_that_is_not_on_the_model_is_refused(tiny_dit):
    model = tiny_dit()
    with pytest.raises(UserError, match="is not on this model"):
        gate_activation(model, Patch.create(model), TIMESTEPS)


def test_maps_lie_as_the_image_and_frames_side_by_side():
    maps = torch.arange(24.0).view(2, 3, 4)
    images = [axes.images[0].get_array().data for axes in plot_spatial_bias(maps, ["a", "b"]).axes[:2]]
    np.testing.assert_array_equal(images, maps.numpy())
    video = torch.arange(48.0).view(2, 2, 3, 4)
    images = [axes.images[0].get_array().data for axes in plot_spatial_bias(video, ["a", "b"]).axes[:2]]
    np.testing.assert_array_equal(images, np.concatenate([video[:, 0], video[:, 1]], axis=2))
