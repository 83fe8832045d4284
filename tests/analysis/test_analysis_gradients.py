"""Gradients against autograd by hand in float64, projection against its stated error, corrections against truth."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from stagepatch.analysis import Samples, count_sketch, even_timesteps, gradient_similarity, gradients, near_and_far
from stagepatch.analysis.gradients import compare_halves, gram
from stagepatch.core.errors import UserError
from stagepatch.data import ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler

TIMESTEPS = [50, 400, 700, 990]
OBJECTIVE = Objective(make_scheduler(ObjectiveConfig()))
COUNT = 6  # halves of 3, so that the last batch of 2 is cut


@pytest.fixture
def model(tiny_dit):
    return tiny_dit(learn_sigma=False)


@pytest.fixture
def samples():
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    return Samples(ImageDataset(images, torch.arange(20) % 10), TIMESTEPS, COUNT, batch_size=2)


def gradient_by_hand(model, samples, timestep, half, names):
    """Of the simple loss (arXiv 2006.11239, Eq. 14), one sample after the other, in float64."""
    exact = copy.deepcopy(model).double().requires_grad_(True)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)
    total = torch.zeros((), dtype=torch.float64)
    for draws in samples.at(timestep, model, OBJECTIVE, half):
        assert draws.timesteps.tolist() == [timestep] * len(draws.x_start)
        for x_start, noise, label in zip(draws.x_start, draws.noise, draws.condition["class_labels"], strict=True):
            signal, sigma = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
            x_t = signal * x_start.double() + sigma * noise.double()
            output = exact(x_t.unsqueeze(0), torch.tensor([timestep]), label.unsqueeze(0), return_dict=False)[0]
            total = total + (output - noise.double()).square().mean()
    chosen = [value for name, value in exact.named_parameters() if names in name]
    found = torch.autograd.grad(total / (COUNT // 2), chosen, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("names", ["", "attn"])
def test_cosines_norms_and_reliability_are_those_of_gradients_by_hand(model, samples, names):
    found = gradient_similarity(model, OBJECTIVE, samples, names)
    by_hand = partial(gradient_by_hand, model, samples)
    halves = [[by_hand(timestep, half, names) for half in (0, 1)] for timestep in TIMESTEPS]
    whole = [(one + two) / 2 for one, two in halves]
    assert found.num_parameters == len(whole[0])
    for row, vector in enumerate(whole):
        assert float(found.norms[row]) == pytest.approx(float(vector.norm()), rel=1e-4)
        expected = float(halves[row][0] @ halves[row][1] / (vector @ vector))
        assert float(found.reliability[row]) == pytest.approx(expected, abs=1e-4)
        for column, other in enumerate(whole):
            cosine = float(F.cosine_similarity(vector, other, dim=0))
            assert float(found.cosine[row, column]) == pytest.approx(cosine, abs=1e-4)
    assert len({round(float(value), 3) for value in found.cosine.flatten()}) > 4


def test_the_model_is_left_as_it_was(model, samples):
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).requires_grad_(True)
    required = [parameter.requires_grad for parameter in model.parameters()]
    gradient_similarity(model, OBJECTIVE, replace(samples, count=2))
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_timestep_and_half_draws_its_own_and_again_the_same(model, samples):
    def noise(timestep, half):
        return torch.cat([draws.noise for draws in samples.at(timestep, model, OBJECTIVE, half)])

    assert noise(50, 0).shape == (COUNT // 2, 1, 8, 8)
    assert noise(50, None).shape == (COUNT, 1, 8, 8)
    assert torch.equal(noise(50, 0), noise(50, 0))
    drawn = [noise(50, 0), noise(50, 1), noise(51, 0)]
    assert len({float(value.sum()) for value in drawn}) == 3
    images = torch.cat([draws.x_start for draws in replace(samples, count=20).at(50, model, OBJECTIVE)])
    assert len({float(image.sum()) for image in images}) == 20  # each once before any again


def test_a_timestep_without_samples_of_its_own_is_refused(model):
    empty = Samples(ImageDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), TIMESTEPS, 2)
    with pytest.raises(UserError, match="no images"):
        gradient_similarity(model, OBJECTIVE, empty)


def pair_with_cosine(cosine, size=3000):
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, size, dtype=torch.float64, generator=generator)
    one = one / one.norm()
    two = two - (two @ one) * one
    return one, cosine * one + math.sqrt(1 - cosine**2) * two / two.norm()


@pytest.mark.parametrize("cosine", [0.0, 0.7])
def test_projection_is_unbiased_and_its_error_is_as_stated(cosine):
    one, two = pair_with_cosine(cosine)
    buckets, trials = 128, 1500
    sketches = [(count_sketch([one], buckets, seed), count_sketch([two], buckets, seed)) for seed in range(trials)]
    products = torch.stack([x @ y for x, y in sketches])
    variance = (1 + cosine**2 - 2 * float((one**2 * two**2).sum())) / buckets
    assert abs(float(products.mean()) - cosine) < 4 * math.sqrt(variance / trials)
    # The deviation of a standard deviation over so many trials is 1/√(2·1500) = 2 %.
    assert float(products.std()) == pytest.approx(math.sqrt(variance), rel=0.08)
    cosines = torch.stack([F.cosine_similarity(x, y, dim=0) for x, y in sketches])
    assert float(cosines.std()) == pytest.approx((1 - cosine**2) / math.sqrt(buckets), rel=0.08)


@pytest.mark.parametrize("piece", [7, 2**20])
def test_projection_is_of_all_tensors_as_one_vector(monkeypatch, piece):
    monkeypatch.setattr(gradients, "_PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 40, 5, generator=generator)
    first, second = (count_sketch([vector[:30], vector[30:]], 64, 3) for vector in (one, two))
    torch.testing.assert_close(count_sketch([one[:30] + two[:30], one[30:] + two[30:]], 64, 3), first + second)
    # With far more buckets than numbers hardly two meet.
    wide = count_sketch([one[:30], one[30:]], 2**24, 3)
    assert float(wide.abs().sum()) == pytest.approx(float(one.abs().sum()), rel=1e-5)
    assert not torch.equal(first, count_sketch([one[:30], one[30:]], 64, 4))


def test_inner_products_are_summed_over_pieces(monkeypatch):
    monkeypatch.setattr(gradients, "_PIECE", 16)
    vectors = torch.randn(4, 1003, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(vectors), vectors.double() @ vectors.double().T)


def test_projected_gradients_have_nearly_the_same_cosines(model, samples):
    exact = gradient_similarity(model, OBJECTIVE, samples)
    projected = gradient_similarity(model, OBJECTIVE, samples, projection=2**14)
    apart = (projected.cosine - exact.cosine).abs()
    assert 0 < float(apart.max()) < 4 / math.sqrt(2**14)
    torch.testing.assert_close(projected.norms, exact.norms, rtol=0.05, atol=0)


def test_correction_finds_the_true_cosines_and_the_error_bounds_the_real_one():
    generator = torch.Generator().manual_seed(0)
    truth = torch.stack(pair_with_cosine(0.5, 400))
    noise = 0.7  # norm of a whole mean's noise, where the signal has norm 1

    def draw():
        drawn = torch.randn(4, 400, dtype=torch.float64, generator=generator)
        return compare_halves([0, 1], gram(truth.repeat_interleave(2, 0) + drawn * noise * (2 / 400) ** 0.5), 400)

    draws = [draw() for _ in range(300)]
    raw = torch.stack([found.cosine[0, 1] for found in draws])
    corrected = torch.stack([found.corrected[0, 1] for found in draws])
    reliability = torch.stack([found.reliability for found in draws])
    assert float(raw.mean()) == pytest.approx(0.5 / (1 + noise**2), abs=0.01)
    assert float(reliability.mean()) == pytest.approx(1 / (1 + noise**2), abs=0.01)
    assert float(corrected.nanmean()) == pytest.approx(0.5, abs=0.01)
    stated = math.sqrt(sum(found.error**2 for found in draws) / len(draws))
    assert stated / math.sqrt(2) * 0.9 < float(raw.std()) < stated * 1.1


def test_nothing_is_corrected_where_the_halves_disagree():
    generator = torch.Generator().manual_seed(0)
    found = compare_halves([0, 1], gram(torch.randn(4, 5000, generator=generator)), 5000)
    assert float(found.reliability.abs().max()) < 0.1
    assert found.corrected.isnan().all()
    assert found.cosine.isfinite().all()
    assert all(math.isnan(value) for value in near_and_far(found.corrected)[:2])


def test_near_far_and_lowest():
    nan = math.nan
    matrix = torch.tensor([[1.0, 0.8, nan, -0.2], [0.8, 1, 0.6, 0.2], [nan, 0.6, 1, nan], [-0.2, 0.2, nan, 1]])
    *means, lowest = near_and_far(matrix)
    assert means == pytest.approx([0.7, 0.0])  # 0.8, 0.6 and NaN; NaN, 0.2 and −0.2
    assert lowest == (0, 3)


def test_timesteps_are_the_middles_of_equal_ranges():
    assert even_timesteps(1000, 4) == [125, 375, 625, 875]
    assert even_timesteps(10, 10) == list(range(10))
    for count in (1, 11):
        with pytest.raises(UserError, match=f"timesteps={count} must be from 2 to 10"):
            even_timesteps(10, count)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"parameters": "nowhere"}, "in no weight's name"),
        ({"parameters": "("}, "not a regular expression"),
        ({"count": 5}, "must be an even number"),
        ({"count": 0}, "must be an even number"),
        ({"projection": -1}, "projection=-1"),
        ({"memory_gib": 1e-4}, "GiB.*projection=65536"),
        ({"memory_gib": 1e-4, "projection": 10**6}, "a smaller projection"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_computed(model, choices, message):
    options = {"count": COUNT, **choices}
    samples = Samples(None, TIMESTEPS, options.pop("count"))
    with pytest.raises(UserError, match=message):
        gradient_similarity(model, OBJECTIVE, samples, **options)


def test_the_memory_that_is_needed_is_named(model):
    weights = sum(parameter.numel() for parameter in model.parameters())
    needed = 2 * len(TIMESTEPS) * weights * 4 / 2**30
    with pytest.raises(UserError, match=f"take {needed:.3g} GiB"):
        gradient_similarity(model, OBJECTIVE, Samples(None, TIMESTEPS, COUNT), memory_gib=needed * 0.99)
