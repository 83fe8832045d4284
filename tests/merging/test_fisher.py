"""Diagonal Fishers against a closed form and gradients of each sample by torch.func; their mean against hand work."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import nn
from torch.func import functional_call, grad, vmap

from stagepatch.checkpoints import save_denoiser
from stagepatch.core import UserError, write_json, write_tensors
from stagepatch.data import DataConfig, ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, TimestepSampler, make_scheduler
from stagepatch.families import registry
from stagepatch.merging import Fishers, MergeMethod, diagonal_fisher, fisher, fisher_mean, merge_models, write_fisher
from tests.runs import make_dataset

T = 1000


class Linear(nn.Module):
    """ε̂ = w ⊙ x_t + b: the loss's gradient is known."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w, self.b = (nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64)) for _ in range(2))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.config = {"in_channels": 1}

    def forward(self, sample, timestep, return_dict=True):
        return (self.w * sample + self.b,)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register("Linear", lambda *_: None)
    return Linear()


@pytest.fixture
def seen(monkeypatch):
    """What was drawn for each sample."""
    seen, losses = [], fisher.sample_losses

    def noted(model, objective, draws):
        seen.append(draws)
        return losses(model, objective, draws)

    monkeypatch.setattr(fisher, "sample_losses", noted)
    return seen


def objective_of(first=0, stop=T):
    return Objective(make_scheduler(ObjectiveConfig()), timesteps=TimestepSampler(T, first, stop))


def noisy(seen):
    """x_t and noise [n, 1, 8, 8] in float64, by arXiv 2006.11239, Eq. 4."""
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.0001, 0.02, T, dtype=torch.float64), 0)
    x_start, noise = (torch.cat([getattr(each, name) for each in seen]).double() for name in ("x_start", "noise"))
    kept = alphas_cumprod[torch.cat([each.timesteps for each in seen])].view(-1, 1, 1, 1)
    return kept.sqrt() * x_start + (1 - kept).sqrt() * noise, noise


def test_fisher_of_a_linear_model_is_the_closed_form(linear, seen):
    found = diagonal_fisher(linear, objective_of(), make_dataset(20), 50)
    x_t, noise = noisy(seen)
    # The loss is Σ_j (w_j x_j + b_j − ε_j)² / 64.
    error = 2 / 64 * (linear.w * x_t + linear.b - noise).detach()
    torch.testing.assert_close(found["w"], (error * x_t).square().mean(dim=(0, 1)), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["b"], error.square().mean(dim=(0, 1)), rtol=1e-4, atol=0)
    assert found["unused"].tolist() == [0.0, 0.0]
    assert {value.dtype for value in found.values()} == {torch.float64}


def test_fisher_approaches_its_expectation(linear):
    linear.w.data.zero_()
    linear.b.data.zero_()
    found = diagonal_fisher(linear, objective_of(), make_dataset(), 400)["b"]
    # (2/64)² E[ε²], and ε² has variance 2.
    expected = (2 / 64) ** 2
    assert float(found.mean()) == pytest.approx(expected, rel=4 * math.sqrt(2 / (64 * 400)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_fisher_is_the_mean_square_of_the_gradients_of_torch_func(tiny_dit, seen):
    model, count = tiny_dit(learn_sigma=False).double(), 12
    found = diagonal_fisher(model, objective_of(200, 300), make_dataset(count), count)
    timesteps = torch.cat([each.timesteps for each in seen])
    labels = torch.cat([each.condition["class_labels"] for each in seen])
    assert 200 <= int(timesteps.min()) < int(timesteps.max()) < 300
    assert len({float(each.x_start.sum()) for each in seen}) == count  # each image once before any again
    assert int(labels.max()) < 10  # none is dropped

    def loss(parameters, x_t, noise, timestep, label):
        arguments = (x_t.unsqueeze(0), timestep.unsqueeze(0), label.unsqueeze(0))
        output = functional_call(model, parameters, arguments, {"return_dict": False})[0]
        return (output[0] - noise).square().mean()

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(parameters, *noisy(seen), timesteps, labels)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient.square().mean(dim=0), rtol=1e-3, atol=1e-12)
    assert sum(float(value.sum()) for value in found.values()) > 0


def test_draws_are_of_the_seed(linear):
    one, same, other = (diagonal_fisher(linear, objective_of(), make_dataset(), 5, seed)["w"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    for samples, images in ((0, 3), (3, 0)):
        dataset = ImageDataset(torch.zeros(images, 1, 8, 8), torch.zeros(images, dtype=torch.long))
        with pytest.raises(UserError, match="A Fisher is a mean over samples"):
            diagonal_fisher(linear, objective_of(), dataset, samples)


def test_hand_computed_mean():
    base, stages = torch.tensor([9.0, 9.0, 9.0]), [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, 7.0])]
    fishers = [torch.tensor([3.0, 0.0, 1e-9]), torch.tensor([1.0, 2.0, 0.0])]
    merged = fisher_mean(base, stages, fishers, [1.0, 3.0])
    # (3·1 + 3·5) / (3 + 3); all of the second, but for 10⁻⁶ parts; where no loss feels the weight, (3 + 3·7) / 4.
    assert merged.tolist() == pytest.approx([3.0, (1e-6 * 2.0 + 6.0 * 6.0) / (1e-6 + 6.0), 6.0], rel=1e-7)
    assert fisher_mean(torch.tensor([1]), [torch.tensor([2])], [torch.zeros(1)], [1.0]).tolist() == [1]


def test_equal_fishers_give_the_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    *stages, shared = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    weights = [0.2, 0.3, 1.5]
    merged = fisher_mean(stages[0], stages, [shared.square()] * 3, weights)
    expected = sum(weight * stage for weight, stage in zip(weights, stages, strict=True)) / 2.0
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two stages of a few numbers, in pieces of three; and Fishers, the second's a hundred times larger."""
    monkeypatch.setattr("stagepatch.merging.models.PIECE", 3)
    tensors = [{"a": torch.full((2, 4), float(number)), "buffer": torch.tensor([7.0])} for number in range(3)]
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for path, each in zip(paths, tensors, strict=True):
        write_tensors(path / "unet" / "diffusion_pytorch_model.safetensors", each)
        write_json(path / "unet" / "config.json", {})
    fishers = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    squares = 1 + torch.arange(8.0).view(2, 4)
    for path, each in zip(fishers, (squares, 100 * squares.flip(1)), strict=True):
        write_tensors(path, {"a": each})
    return SimpleNamespace(paths=paths, fishers=fishers, squares=(squares, squares.flip(1)), output=tmp_path / "out")


@pytest.mark.parametrize(("normalize", "factor"), [(True, 1.0), (False, 100.0)])
def test_written_model_is_the_mean_by_the_files(models, normalize, factor):
    base, *stages = models.paths
    method = MergeMethod("fisher", normalize=normalize)
    merge_models(base, stages, [2.0, 1.0], models.output, method, models.fishers)
    found = load_file(models.output / "unet" / "diffusion_pytorch_model.safetensors")
    one, two = (each.double() for each in models.squares)
    expected = (2 * one * 1.0 + factor * two * 2.0) / (2 * one + factor * two)
    torch.testing.assert_close(found["a"].double(), expected, rtol=1e-6, atol=0)
    assert found["buffer"].tolist() == [7.0]


def test_what_is_no_mean_is_refused(models, tmp_path):
    base, *stages = models.paths
    method, given = MergeMethod("fisher"), models.fishers

    def refused(message, weights=(1.0, 1.0), fishers=given, method=method):
        with pytest.raises(UserError, match=message):
            merge_models(base, stages, weights, models.output, method, fishers)
        assert not models.output.exists()

    refused("1 weights for 2 stages", weights=[1.0])
    refused("none may be negative", weights=[1.0, -0.5])
    refused("one must be above 0", weights=[0.0, 0.0])
    refused("1 Fishers for 2 stages", fishers=given[:1])
    refused("2 Fishers for 2 stages: merge_method='fisher' needs", method=MergeMethod())
    refused("No such file", fishers=[given[0], tmp_path / "nowhere"])
    write_tensors(given[1], {"a": torch.ones(3)})
    refused("two.safetensors' is the Fisher of another model: it holds 'a'")


def test_all_fishers_zero_give_the_mean(models):
    for path in models.fishers:
        write_tensors(path, {"a": torch.zeros(2, 4)})
    shapes = {"a": ((2, 4), torch.float32)}
    (pieces,) = Fishers(models.fishers, shapes).pieces("a", 8)
    assert (
        fisher_mean(torch.zeros(8), [torch.ones(8), torch.full((8,), 3.0)], pieces, [1.0, 1.0]).tolist() == [2.0] * 8
    )


def test_file_is_of_the_stages_own_range_and_is_made_once(tiny_dit, tmp_path, seen, monkeypatch):
    stage, path, data = tmp_path / "stage", tmp_path / "fisher" / "0.safetensors", DataConfig()
    model, done = tiny_dit(), []
    save_denoiser(model, make_scheduler(ObjectiveConfig(), learn_sigma=True), stage)
    write_json(stage / "stage.json", {"from": 700, "to": 720})
    write_fisher(path, stage, make_dataset(), data, 6, on_sample=done.append)
    assert all(700 <= int(each.timesteps) < 720 for each in seen)
    assert done == [1] * 6
    tensors = load_file(path)
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["fisher"])
    assert (facts["range"], facts["samples"], facts["data"]["source"]) == ([700, 720], 6, "digits")
    write_fisher(path, stage, make_dataset(), data, 6, on_sample=done.append)
    assert (len(seen), done) == (6, [1] * 6 + [6])
    write_fisher(path, stage, make_dataset(), data, 6, seed=1)
    assert len(seen) == 12
    monkeypatch.setattr(fisher, "diagonal_fisher", lambda *_: {"a": torch.tensor(0.0).expand(2).to("meta")})
    path.unlink()
    with pytest.raises(NotImplementedError):
        write_fisher(path, stage, make_dataset(), data, 6)
    assert list(path.parent.iterdir()) == []  # whole or absent
