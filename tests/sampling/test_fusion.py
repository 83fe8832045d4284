"""Two denoisers side by side: the mixture of their features, by hand, and that the two meet at every block."""

import copy

import numpy as np
import pytest
import torch

from stagepatch.core import UserError
from stagepatch.sampling import ExpertRange, Experts
from stagepatch.sampling.fusion import maxfusion
from tests.sampling.test_experts import answer, drawn_patch
from tests.sampling.test_experts_file import load, ranges, stages  # noqa: F401
from tests.tiny import FAMILIES

# Of two models, three places (rows) of four channels.
OWN = np.array([[1.0, 2, 3, 4], [2, -2, 2, -2], [0, 1, 0, -1]])
OTHERS = np.array([[3.0, 5, 6, 8], [1, 1, -1, -1], [4, 0, -4, 0]])


def fused(own, *denoisers, fuse="maxfusion"):
    return Experts([ExpertRange(0, 1000, each) for each in denoisers], fuse=fuse).attach(own)


def written_out(own, others):
    """The features of each model afterwards, place by place."""
    shares = [rows.var(axis=1) / rows.var(axis=1).sum() for rows in (own, others)]
    results = np.empty((2, *own.shape))
    for place, (first, second) in enumerate(zip(own, others, strict=True)):
        if np.corrcoef(first, second)[0, 1] > 0.7:
            results[:, place] = (first + second) / 2
        elif shares[0][place] >= shares[1][place]:
            results[:, place] = first, first * second.std() / first.std()
        else:
            results[:, place] = second * first.std() / second.std(), second
    return results


def test_features_are_mixed_as_in_a_case_by_hand():
    """The models agree on the first place; of the second the first's share is larger, of the third the second's."""
    own, others = (torch.tensor(rows)[None] for rows in (OWN, OTHERS))
    first, second = maxfusion(own, others, "tokens")
    # Variances 1.25, 4, 0.5 of 5.75 and 3.25, 1, 8 of 12.25. Standard deviations 2 and 1; √0.5 and √8.
    expected = torch.tensor([[[2, 3.5, 4.5, 6], [2, -2, 2, -2], [1, 0, -1, 0]]], dtype=torch.float64)
    torch.testing.assert_close(first, expected)
    expected[0, 1:] = torch.tensor([[1, -1, 1, -1], [4, 0, -4, 0]])
    torch.testing.assert_close(second, expected)
    first, second = maxfusion(own, others, "tokens", rescale=False)
    expected[0, 1] = own[0, 1]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("layout", ["tokens", "sequence", "map"])
def test_features_are_mixed_a_sample_apart_in_every_layout(layout):
    order = {"tokens": (0, 1, 2), "sequence": (1, 0, 2), "map": (0, 2, 1)}[layout]
    drawn = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[1] += drawn[0]  # about half of the places agree
    inputs = [rows.permute(order) for rows in drawn]
    inputs = [rows.reshape(2, 5, 2, 3) for rows in inputs] if layout == "map" else inputs
    expected = np.stack([written_out(*rows) for rows in drawn.transpose(0, 1).numpy()], axis=1)
    for output, rows in zip(maxfusion(*inputs, layout), torch.from_numpy(expected), strict=True):
        torch.testing.assert_close(output.reshape(rows.permute(order).shape), rows.permute(order))


def test_features_without_spread_are_not_divided_by():
    flat = torch.ones(1, 3, 4)
    drawn = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    drawn[0, 1] = 5.0
    for pair in ((flat, flat), (drawn, drawn)):
        assert all(torch.equal(output, pair[0]) for output in maxfusion(*pair, "tokens"))
    assert all(output.isfinite().all() for output in maxfusion(flat, drawn, "tokens"))
    assert maxfusion(drawn.bfloat16(), drawn.bfloat16(), "tokens")[0].dtype == torch.bfloat16


def test_two_models_go_through_their_blocks_together(tiny_dit, batch):
    base, other = tiny_dit(0), tiny_dit(1)
    sample, _, labels = batch
    hidden, embeds = [], []
    for model in (base, other):
        hidden.append(model.x_embedder(sample) + model._positions((4, 4)))
        embeds.append(model.t_embedder(torch.full((4,), 300)) + model.y_embedder(labels))
    for own, others in zip(base.blocks, other.blocks, strict=True):
        hidden = maxfusion(*hidden, "tokens")
        hidden = own(hidden[0], embeds[0], (4, 4)), others(hidden[1], embeds[1], (4, 4))
    hidden = maxfusion(*hidden, "tokens", rescale=False)
    expected = sum(
        model._unpatchify(model.final_layer(rows, embed), (4, 4)) / 2
        for model, rows, embed in zip((base, other), hidden, embeds, strict=True)
    )
    alone = answer(base, batch, 300)
    with fused(base, None, other):
        torch.testing.assert_close(answer(base, batch, 300), expected)
        assert not torch.allclose(expected, (alone + answer(other, batch, 300)) / 2, atol=1e-2)
    assert torch.equal(answer(base, batch, 300), alone)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in (*base.blocks, *other.blocks))


@pytest.mark.parametrize(
    "name", ["DiT", "UNet2DConditionModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel"]
)
def test_a_model_beside_its_copy_is_the_model_bit_for_bit(name):
    family = FAMILIES[name]
    base, other = family.model(0), family.model(1)
    for dtype in (torch.float32, torch.bfloat16):
        base, other = base.to(dtype), other.to(dtype)
        expected = family.call(base)
        with fused(base, None, copy.deepcopy(base)):
            assert torch.equal(family.call(base), expected)
        with fused(base, other, None):
            mixed = family.call(base)
            assert not torch.allclose(mixed, expected, atol=0.1)
            assert torch.equal(family.call(base), mixed)


def test_a_unet_s_skip_connections_are_mixed_where_they_enter():
    family = FAMILIES["UNet2DConditionModel"]
    base, other = family.model(0), family.model(1)
    seen = []
    for model in (base, other):
        hook = lambda block, args, kwargs: seen.append(kwargs["res_hidden_states_tuple"])  # noqa: E731
        model.up_blocks[-1].register_forward_pre_hook(hook, with_kwargs=True)
    with fused(base, None, other):
        family.call(base, size=(9, 8))  # a size that is no power of two is told to the blocks, as numbers
    for own, others in zip(*seen, strict=True):
        centred = [rows - rows.mean(1, keepdim=True) for rows in (own, others)]
        likeness = torch.cosine_similarity(*centred, dim=1)  # the one's are the other's, times a factor
        torch.testing.assert_close(likeness, torch.ones_like(likeness))


def test_ranges_that_overlap_in_a_file(stages, tmp_path, batch):  # noqa: F811
    base = stages["base"]
    entries = [*ranges((0, 1000)), *ranges((0, 400), learned="patch"), *ranges((400, 700), learned="finetune")]
    experts = load(tmp_path, base, experts=entries, fuse="maxfusion")
    expected = {t: answer(base, batch, t) for t in (100, 500, 800)}
    for timestep, name in ((100, "patch"), (500, "finetune")):
        with fused(base, None, stages[name]):
            expected[timestep] = answer(base, batch, timestep)
    rows = zip(*(value.split(1) for value in batch), strict=True)
    with experts.attach(base), torch.inference_mode():
        for timestep, output in expected.items():
            mixed = answer(base, batch, timestep)
            assert mixed.is_inference()
            torch.testing.assert_close(mixed, output)
        # In a batch of several ranges, each sample is as alone.
        together = base(*batch).sample
        alone = torch.cat([base(*row).sample for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_patch_comes_after_the_mixture(tiny_dit, batch):
    """It is a block's input that is patched; a patch of nothing changes nothing."""
    base, other = tiny_dit(0), tiny_dit(1)
    with fused(base, None, other):
        expected = answer(base, batch, 300)
        patch = drawn_patch(other)
        patch.attach(other)
        assert not torch.allclose(answer(base, batch, 300), expected, atol=1e-3)
        patch.scale = 0.0
        torch.testing.assert_close(answer(base, batch, 300), expected)


@pytest.mark.gpu
def test_both_use_the_stream_of_their_caller(tiny_dit, batch):
    base, other = tiny_dit(0), tiny_dit(1)
    with fused(base, None, other):
        expected = answer(base, batch, 300)
        base.cuda(), other.cuda()
        with torch.cuda.stream(torch.cuda.Stream()):
            mixed = answer(base, [value.cuda() for value in batch], 300)
            torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(mixed.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_in_one_ends_both(tiny_dit, batch, at):
    models = [tiny_dit(0), tiny_dit(1)]

    def fail(*_):
        raise ValueError("no memory")

    with fused(models[0], None, models[1]):
        handle = models[at].blocks[1].register_forward_hook(fail)
        with pytest.raises(ValueError, match="no memory"):
            answer(models[0], batch, 300)
        handle.remove()
        answer(models[0], batch, 300)


def test_models_that_cannot_be_mixed_are_refused(tiny_dit, batch):
    base = tiny_dit(0)
    for other in (tiny_dit(1, num_layers=2), tiny_dit(1, hidden_size=16)):
        with pytest.raises(UserError, match="both models must have the same blocks"):
            fused(base, None, other)
    assert "forward" not in vars(base)
    other = tiny_dit(1)
    other.blocks[1].forward = lambda hidden, *_: other.blocks[0](hidden, *_)
    with fused(base, None, other), pytest.raises(UserError, match="do not come through their blocks alike"):
        answer(base, batch, 300)
