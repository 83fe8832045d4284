"""How far a patch moves blocks and prediction, against closed forms; a gate over training."""

import copy
import math

import pytest
import torch

from stagepatch.analysis import Samples, analyze_effect, analyze_gate_training, measure_effect
from stagepatch.analysis.effect import _recorded
from stagepatch.families import describe
from stagepatch.patch import Patch, PatchConfig
from tests.runs import draw_weights, make_dataset, make_objective
from tests.tiny import FAMILIES

OBJECTIVE = make_objective(learn_sigma=False)


def samples_at(*timesteps, count=6):
    return Samples(make_dataset(), timesteps, count, batch_size=4)


def scaled(factor):
    """A hook that multiplies a module's output."""
    return lambda module, args, output: output * factor


def test_a_model_against_itself_is_not_moved(tiny_dit):
    found = measure_effect(tiny_dit(), tiny_dit(), OBJECTIVE, samples_at(100, 900))
    assert found.sites == ["blocks.0", "blocks.1", "blocks.2"]
    assert not found.blocks.any()
    assert not found.prediction.any()
    assert not found.error.any()


def test_a_block_that_puts_out_half_as_much_more_is_moved_by_half(tiny_dit):
    model, other = tiny_dit(learn_sigma=False), tiny_dit(learn_sigma=False)
    other.blocks[2].register_forward_hook(scaled(1.5))
    found = measure_effect(model, other, OBJECTIVE, samples_at(100, 900))
    torch.testing.assert_close(found.blocks, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]).double())


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_prediction_of_a_third_less_is_moved_by_a_third(tiny_dit, learn_sigma):
    model, other = (tiny_dit(learn_sigma=learn_sigma) for _ in range(2))

    factors = torch.tensor([2 / 3, 7.0][: 1 + learn_sigma]).view(1, -1, 1, 1)  # the variance is no part of it
    other.register_forward_hook(lambda module, args, output: (output[0] * factors,))
    found = measure_effect(model, other, make_objective(learn_sigma=learn_sigma), samples_at(100, 900))
    torch.testing.assert_close(found.prediction, torch.full((2,), 1 / 3))
    torch.testing.assert_close(found.error, torch.zeros(2), atol=1e-4, rtol=0)
    assert not found.blocks.any()


def test_the_error_is_that_of_other_draws(tiny_dit):
    model, other = (tiny_dit(seed, learn_sigma=False) for seed in (0, 1))
    dataset, drawn = make_dataset(400), []
    for seed in range(20):
        drawn.append(measure_effect(model, other, OBJECTIVE, Samples(dataset, [500], 30, batch_size=30, seed=seed)))
    values, errors = (torch.stack([getattr(each, name) for each in drawn]) for name in ("prediction", "error"))
    assert errors.square().mean().sqrt() == pytest.approx(float(values.std()), rel=0.3)


def test_a_patch_moves_no_block_before_it(tiny_dit):
    model = tiny_dit(learn_sigma=False)
    patch = Patch.create(model, PatchConfig(sites=["blocks.1"]))
    draw_weights(patch.parameters())
    patched = copy.deepcopy(model)
    patch.attach(patched)
    analysis = analyze_effect(model, patched, OBJECTIVE, samples_at(10, 300, 600, 900))
    blocks = analysis.numbers["blocks"]
    assert not blocks[0].any()
    assert (blocks[1:] > 0).all()
    assert (analysis.numbers["prediction"] > 0).all()
    (summary,), (by_block,) = analysis.summary, analysis.details
    assert [row[0] for row in summary.rows] == ["10 to 10", "300 to 300", "600 to 600", "900 to 900"]
    assert {row[4] for row in summary.rows} <= {"blocks.1", "blocks.2"}
    assert by_block.rows[0] == ["blocks.0", *["0 %"] * 4]
    assert float(by_block.rows[2][1].split()[0]) == pytest.approx(100 * float(blocks[2, 0]), rel=0.01)


@pytest.mark.parametrize("name", ["UNet2DModel", "FluxTransformer2DModel", "ErnieImageTransformer2DModel"])
def test_of_what_a_block_puts_out_the_image_is_taken(name):
    """A U-Net's stage also puts out what its skips carry, a block of two streams its text."""
    family = FAMILIES[name]
    model = family.model()
    backbone = describe(model, family.size)
    sites = [site for site in backbone.sites if site.kind == backbone.sites[0].kind]
    inputs = {key: draw(2, *family.size) for key, draw in family.draws.items()}
    with torch.no_grad(), _recorded(model, sites) as found:
        model(**inputs)
    assert list(found) == [site.name for site in sites]
    for site in sites:
        if site.layout == "map":
            assert found[site.name].ndim == 4
        else:
            assert found[site.name].shape[-1] == site.channels
            assert math.prod(found[site.name].shape[:-1]) >= 2 * site.num_tokens


def test_a_gate_over_training_is_each_snapshots_own(tiny_dit, tmp_path):
    """Of k prompts that share all weight alike, the entropy is log k."""
    model, snapshots = tiny_dit(), {}
    for iteration, count in [(100, 16), (200, 4), (300, 2)]:
        patch = Patch.create(model, PatchConfig())
        with torch.no_grad():
            patch.gate.bias.copy_(torch.where(torch.arange(16) < count, 0.0, -60.0))
        snapshots[iteration] = tmp_path / f"{iteration:07d}"
        patch.save_pretrained(snapshots[iteration])
    found = analyze_gate_training(model, snapshots, torch.tensor([100, 500]))
    assert found.numbers["iterations"] == [100, 200, 300]
    shares = torch.tensor([16.0, 4.0, 2.0]).expand(3, 3)
    torch.testing.assert_close(found.numbers["effective_prompts"], shares)
    torch.testing.assert_close(found.numbers["entropy"], shares.log(), atol=1e-6, rtol=1e-6)
    assert [row[:3] for row in found.summary[0].rows] == [
        ["100", "2.773", "16"],
        ["200", "1.386", "4"],
        ["300", "0.6931", "2"],
    ]
