"""DARE and TIES against peft's own functions, and DARE against what it leaves unchanged: the expectation."""

import zlib

import pytest
import torch
from peft.utils.merge_utils import dare_linear, dare_ties, prune, ties
from safetensors.torch import load_file

from stagepatch.core import UserError, seed_for, write_json, write_tensors
from stagepatch.merging import MergeMethod, combine, combine_loras, merge, merge_loras, merge_models
from stagepatch.merging.lora import CONFIG_NAME, FILE_NAME
from tests.runs import assert_same

NAME = "blocks.0.weight"
DARE = MergeMethod("dare", dare_drop=0.75, seed=3)


@pytest.fixture
def tensors():
    """A base [20, 30] and three stages, in float64."""
    base, *stages = torch.randn(4, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return base, stages


def as_peft_draws(method):
    """Set peft's draws to those of the method's."""
    torch.default_generator.manual_seed(seed_for(201, method.seed, zlib.crc32(NAME.encode())))


def vectors_of(base, stages):
    return [stage - base for stage in stages]


def test_dare_is_pefts(tensors):
    base, stages = tensors
    weights = [0.5, -0.2, 0.9]
    merged = combine(base, stages, weights, DARE, NAME)
    as_peft_draws(DARE)
    expected = base + dare_linear(vectors_of(base, stages), torch.tensor(weights, dtype=torch.float64), 0.25)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged, combine(base, stages, weights), atol=0.1)


def test_dare_with_elected_signs_is_pefts_times_the_stages(tensors):
    base, stages = tensors
    method = MergeMethod("dare_ties", dare_drop=0.3, seed=5)
    merged = combine(base, stages, [1 / 3] * 3, method, NAME)
    as_peft_draws(method)
    expected = base + dare_ties(vectors_of(base, stages), torch.ones(3, dtype=torch.float64), 0.7)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def test_what_dare_leaves_can_be_trimmed_as_its_authors_do(tensors):
    base, stages = tensors
    method = MergeMethod("dare_ties", dare_drop=0.3, ties_keep=0.2, seed=5)
    as_peft_draws(method)
    dropped = [prune(vector, 0.7, "random", rescale=True) for vector in vectors_of(base, stages)]
    expected = base + ties(dropped, torch.ones(3, dtype=torch.float64), 0.2)
    torch.testing.assert_close(combine(base, stages, [1 / 3] * 3, method, NAME), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_with_equal_weights_is_pefts_times_the_stages(tensors, keep):
    base, stages = tensors
    merged = combine(base, stages, [1 / 3] * 3, MergeMethod(ties_keep=keep))
    expected = base + ties(vectors_of(base, stages), torch.ones(3, dtype=torch.float64), keep)
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The density")
def test_where_ties_differs_from_pefts():
    base = torch.zeros(2)
    stages, weights = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -3.0])], [0.8, 0.2]
    # Ours: +0.8 − 0.2 and +1.6 − 0.6, both positive. Peft: 1 − 1 counts as positive, 2 − 3 is negative.
    ours = combine(base, stages, weights, MergeMethod(ties_keep=1.0))
    assert ours.tolist() == pytest.approx([2 * 0.8, 2 * 1.6])
    assert ties(stages, torch.tensor(weights), 1.0).tolist() == pytest.approx([0.8, -0.6])
    # The signs' sum is zero: ours adds nothing.
    assert combine(base, stages, [0.5, 0.5], MergeMethod(ties_keep=1.0))[0] == 0.0


def test_dare_drops_its_share_and_keeps_the_expectation(tensors):
    base, stages = tensors
    weights, trials, share = [0.7, 0.0, 0.0], 400, 0.75
    draws = torch.stack(
        [combine(base, stages, weights, MergeMethod("dare", 0.0, share, seed=n)) for n in range(trials)]
    )
    dropped = (draws == base).double().mean()
    assert float(dropped) == pytest.approx(share, abs=4 * (share * (1 - share) / draws.numel()) ** 0.5)
    # A kept number is divided by 1 − p: the variance of a draw is τ² p / (1 − p).
    vector = 0.7 * (stages[0] - base)
    z = (draws.mean(dim=0) - base - vector) / (vector.abs() * (share / (1 - share) / trials) ** 0.5)
    assert float(z.abs().max()) < 5.0
    assert float(z.std()) == pytest.approx(1.0, abs=0.1)


def test_draws_are_of_seed_and_tensor_and_leave_torchs_own_alone(tensors):
    base, stages = tensors
    weights = [1.0, 1.0, 1.0]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    one = combine(base, stages, weights, DARE, NAME)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(combine(base, stages, weights, DARE, NAME), one)
    others = [
        combine(base, stages, weights, DARE, "other"),
        combine(base, stages, weights, MergeMethod("dare", 0.0, 0.75)),
    ]
    assert not any(torch.equal(other, one) for other in others)
    alike = [stages[0]] * 2
    parts = [combine(base, alike, pair, DARE, NAME) for pair in ([1.0, 0.0], [0.0, 1.0])]
    assert not torch.equal(*parts)  # each stage has draws of its own
    assert torch.equal(combine(base, stages, [0.0] * 3, DARE, NAME), base)


@pytest.mark.parametrize("method", [DARE, MergeMethod("dare_ties", dare_drop=0.5)], ids=lambda method: method.kind)
def test_written_model_does_not_depend_on_the_size_of_pieces(tmp_path, method, monkeypatch):
    shapes = {"a": (300, 120), "b": (7,), "c": ()}  # the first is larger than a piece
    for number, stage in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(number)
        weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        write_tensors(tmp_path / stage / "unet" / "diffusion_pytorch_model.safetensors", weights)
        write_json(tmp_path / stage / "unet" / "config.json", {})
    found = []
    for piece in (2**15, 7):
        monkeypatch.setattr("stagepatch.merging.models.PIECE", piece)
        output = tmp_path / str(piece)
        merge_models(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], [0.5, 0.5], output, method)
        found.append(load_file(output / "unet" / "diffusion_pytorch_model.safetensors"))
    assert_same(*found)
    changed = (found[0]["a"] != load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")["a"]).double()
    both_dropped = method.dare_drop**2
    assert float(changed.mean()) == pytest.approx(1 - both_dropped, abs=0.02)


def draw_loras(count=2, rank=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A.weight": (rank, 5), "x.lora_B.weight": (4, rank)}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def product(lora):
    return lora["x.lora_B.weight"] @ lora["x.lora_A.weight"]


def test_dropped_loras_expect_the_sum():
    loras, weights, trials = draw_loras(), [0.5, 2.0], 4000
    draws = torch.stack(
        [product(combine_loras(loras, weights, MergeMethod("dare", dare_drop=0.5, seed=n))) for n in range(trials)]
    )
    expected = product(combine_loras(loras, weights))
    z = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / trials**0.5)
    assert float(z.abs().max()) < 4.5
    assert not torch.allclose(draws[0], expected, atol=0.1)


def test_merged_lora_is_of_what_peft_leaves_of_each_matrix(tmp_path):
    loras = draw_loras()
    stages = [tmp_path / "0", tmp_path / "1"]
    for stage, lora in zip(stages, loras, strict=True):
        write_tensors(stage / FILE_NAME, lora)
        write_json(stage / CONFIG_NAME, {"rank": 2})
    merge_loras(stages, [0.5, 2.0], tmp_path / "out", DARE)
    found = load_file(tmp_path / "out" / FILE_NAME)
    for name, dim in (("x.lora_A.weight", 0), ("x.lora_B.weight", 1)):
        torch.default_generator.manual_seed(seed_for(201, DARE.seed, zlib.crc32(name.encode())))
        left = [prune(lora[name], 0.25, "random", rescale=True) for lora in loras]
        factors = (1.0, 1.0) if dim == 0 else (0.5, 2.0)
        assert_same(found[name], torch.cat([factor * part for factor, part in zip(factors, left, strict=True)], dim))
    merge(stages, [0.5, 2.0], tmp_path / "same", method=DARE)
    assert_same(load_file(tmp_path / "same" / FILE_NAME), found)
    with pytest.raises(UserError, match="LoRAs merged by 'ties' would not be a LoRA"):
        merge(stages, [0.5, 2.0], tmp_path / "ties", ties_keep=0.5)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"name": "slerp"}, "merge_method='slerp' is none of sum, ties, dare, dare_ties, fisher"),
        ({"name": "ties"}, "merge_method='ties' needs ties_keep"),
        ({"name": "dare"}, "merge_method='dare' needs dare_drop"),
        ({"name": "dare_ties", "ties_keep": 0.2}, "merge_method='dare_ties' needs dare_drop"),
        ({"name": "sum", "ties_keep": 0.2}, "ties_keep is an option of merge_method ties or dare_ties, not of 'sum'"),
        ({"name": "dare", "dare_drop": 0.9, "ties_keep": 0.2}, "ties_keep is an option of"),
        ({"dare_drop": 0.9}, "dare_drop is an option of merge_method dare or dare_ties, not of 'sum'"),
        (
            {"ties_keep": 0.2, "dare_drop": 0.9},
            "dare_drop is an option of merge_method dare or dare_ties, not of 'ties'",
        ),
        ({"name": "dare", "dare_drop": 1.0}, "dare_drop=1.0 must be a share"),
        ({"name": "dare", "dare_drop": -0.1}, "dare_drop=-0.1 must be a share"),
        ({"ties_keep": 1.1}, "ties_keep=1.1 must be a share"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        MergeMethod(**choices)
