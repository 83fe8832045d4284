"""A diagnosis of models whose trouble is known: of Gaussian pixels, where the best denoiser has a closed form."""

import math
import shlex
from dataclasses import replace

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from stagepatch.analysis import Change, DiagnoseConfig, change, diagnose, diagnosis_in_words, give_advice
from stagepatch.analysis.advice import BENCH, MEASURED, UNMEASURED
from stagepatch.analysis.free import FreeWin
from stagepatch.analysis.verdicts import RULE, decide, judge
from stagepatch.cli import app
from stagepatch.core import UserError
from stagepatch.data import DataConfig, ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.families import describe_structure, register, registry

MEAN, DEVIATION = 0.5, 0.7
OBJECTIVE = Objective(make_scheduler(ObjectiveConfig(prediction_type="flow_prediction")))


def optimum(sigma):
    """a, b and loss of the best predictor a·x + b of noise − x_start for x = (1 − σ)·x_start + σ·noise."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope, -MEAN - slope * (1 - sigma) * MEAN, 1 + DEVIATION**2 - slope**2 * variance


class Toy(ModelMixin, ConfigMixin):
    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.register_to_config(in_channels=1, out_channels=1, conditioning="none", sample_size=4)


class Affine(Toy):
    """a·x + b, one a and b for all noise levels, or knots over them; at the optimum, or at zero."""

    def __init__(self, knots=1, solved=True):
        super().__init__()
        levels = torch.linspace(0, 1, knots) if knots > 1 else torch.linspace(0, 1, 1000)
        slope, offset, _ = optimum(levels)
        if knots == 1:  # least squares over all levels, of E[x·v] and E[x²], with means
            mean, square = (
                (1 - levels) * MEAN,
                ((1 - levels) * DEVIATION) ** 2 + levels**2 + ((1 - levels) * MEAN) ** 2,
            )
            product = slope * square + offset * mean
            slope = (product.mean() - mean.mean() * -MEAN) / (square.mean() - mean.mean() ** 2)
            offset = -MEAN - slope * mean.mean()
        values = torch.stack([slope.reshape(-1), offset.reshape(-1)])
        self.knots = nn.Parameter(values if solved else torch.zeros_like(values))

    def forward(self, sample, timestep, return_dict=True):
        place = (timestep.float() / 1000).clamp(0, 1) * (self.knots.shape[1] - 1)
        low = place.floor().long().clamp(max=max(0, self.knots.shape[1] - 2))
        high, share = (low + 1).clamp(max=self.knots.shape[1] - 1), place - low
        slope, offset = (self.knots[:, low] * (1 - share) + self.knots[:, high] * share).view(2, -1, 1, 1, 1)
        return (slope * sample + offset,)


class Memory(Toy):
    """The best denoiser of its training images alone, which it knows by heart: they are its weights."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images.clone())

    def forward(self, sample, timestep, return_dict=True):
        sigma = (timestep.float() / 1000).view(-1, 1, 1, 1).clamp(0.001, 0.999)
        apart = (sample.unsqueeze(1) - (1 - sigma).unsqueeze(1) * self.images).flatten(2).square().sum(dim=2)
        shares = (-apart / (2 * sigma.view(-1, 1) ** 2)).softmax(dim=1)
        x_start = (shares @ self.images.flatten(1)).view_as(sample)
        return ((sample - x_start) / sigma,)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    for each in (Affine, Memory):
        register(each.__name__, describe_structure)
    yield
    for each in (Affine, Memory):
        registry._FAMILIES.pop(each.__name__)


def gaussian(count, seed):
    images = MEAN + DEVIATION * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return ImageDataset(images, torch.zeros(count, dtype=torch.long))


def diagnosed(model, count=1000, **options):
    short = {"steps": 30, "rates": [0.05], "batch_size": 32, "timesteps": 6, "images": 128}
    config = DiagnoseConfig(**{**short, **options})
    return diagnose(config, model, OBJECTIVE, gaussian(count, 0), gaussian(1000, 1))


def advised(found):
    return [each.key for each in give_advice(DiagnoseConfig(), found)]


def test_of_a_model_at_its_optimum_the_losses_are_the_closed_form_and_nothing_lowers_them():
    found = diagnosed(Affine(knots=25), rates=[0.01], steps=60, batch_size=64, images=500)
    expected = [optimum((timestep + 1) / 1000)[2] for timestep in found.timesteps]
    for losses in (found.trained, found.held_out):
        error = losses.std(dim=1) / math.sqrt(losses.shape[1])
        assert ((losses.mean(dim=1) - torch.tensor(expected)).abs() < 4 * error + 2e-3).all()
    assert found.verdicts.converged == "yes"
    assert found.verdicts.over_fitted != "yes"
    assert found.verdicts.limited_by in ("none_found", "unclear")
    assert found.verdicts.stages != "agree"
    measured = {each.key for each in give_advice(DiagnoseConfig(), found) if each.evidence == MEASURED}
    assert {"train_longer", "more_data", "copies_by_range"}.isdisjoint(measured)


def test_a_model_that_still_learns_is_limited_by_training():
    found = diagnosed(Affine(knots=25, solved=False))
    assert found.verdicts.converged == found.verdicts.converged_other_density == "no"
    assert found.longer[0].high < -0.1
    assert found.verdicts.limited_by == "training"
    keys = advised(found)
    assert keys[0] == "train_longer"
    assert not {"ddo", "guide", "other_density"} & set(keys)


def test_a_model_that_knows_its_images_by_heart_is_limited_by_data():
    found = diagnosed(Memory(gaussian(40, 0).images), count=40)
    assert found.verdicts.over_fitted == "yes"
    assert found.gap.low > 0.1
    assert found.verdicts.limited_by == "data"
    assert advised(found)[0] == "more_data"


@pytest.fixture(scope="module")
def one_map():
    """Of one map for all noise levels: the best slope is below zero at the image's end, above it at the noise's."""
    return diagnosed(Affine())


def test_one_map_for_all_noise_levels_is_limited_by_capacity_and_its_stages_conflict(one_map):
    found = one_map
    assert optimum(0.05)[0] < 0 < optimum(0.95)[0]
    verdicts = found.verdicts
    assert verdicts.converged == "yes"
    assert (verdicts.limited_by, verdicts.stages) == ("capacity", "conflict")
    assert found.far.mean == pytest.approx(-1.0, abs=0.1)
    assert advised(found)[:2] == ["copies_by_range", "stage_lora"]
    levels = torch.linspace(0, 1, 1000)
    slope, offset = Affine().knots.detach()[:, 0]
    best, _, least = optimum(levels)
    square = ((1 - levels) * DEVIATION) ** 2 + levels**2
    shift = (slope - best) * (1 - levels) * MEAN + offset - optimum(levels)[1]
    excess = ((slope - best) ** 2 * square + shift**2).mean()  # what weights of their own at every level would save
    assert 0 > found.copies[0].mean > -excess / (least.mean() + excess)


def test_trainings_that_raise_even_the_training_loss_tell_nothing_of_copies_either(one_map):
    rises, falls = Change(0.01, 0.008, 0.012), Change(-0.01, -0.012, -0.008)
    none = Change(0.0, -0.001, 0.001)
    told = judge(none, [none], [none], none, [rises], "unclear")
    assert (told.converged, told.converged_other_density) == ("yes", "yes")
    assert (told.shares_too_little, told.limited_by) == ("no", "none_found")
    untold = judge(none, [rises], [rises], none, [rises], "unclear")
    assert (untold.converged, untold.converged_other_density) == ("unclear", "unclear")
    assert (untold.shares_too_little, untold.limited_by) == ("unclear", "unclear")
    assert judge(none, [rises], [rises], none, [falls], "unclear").limited_by == "capacity"
    for trained, why in ((rises, "too few steps or too high a rate"), (none, "the intervals are too wide")):
        unclear = replace(one_map, verdicts=untold, longer=[rises], longer_trained=[trained], rates=[1e-3])
        assert f"{why} (more" in (line := diagnosis_in_words(unclear)[1])
        assert "averaged steps: +1.00 % (+0.80 to +1.20) at 0.001." in line
    keys = {each.key: each for each in give_advice(DiagnoseConfig(), replace(one_map, verdicts=untold))}
    assert keys["copies_by_range"].evidence == BENCH
    assert "no_stages" not in keys
    assert "no_stages" in advised(replace(one_map, verdicts=told))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("yes", 0.05, "no", 0.001, "yes"), "training"),
        (("yes", 0.05, "yes", 0.2, "yes"), "data"),
        (("yes", 0.2, "yes", 0.05, "no"), "training"),
        (("no", 0.0, "yes", 0.05, "yes"), "data"),
        (("no", 0.0, "no", 0.0, "yes"), "capacity"),
        (("unclear", 0.0, "no", 0.0, "yes"), "capacity"),
        (("no", 0.0, "no", 0.0, "no"), "none_found"),
        (("no", 0.0, "unclear", 0.0, "no"), "unclear"),
    ],
)
def test_what_limits_is_decided_as_the_rule_says(given, expected):
    assert decide(*given) == expected
    assert "0.2 % and 1 % are our choice" in RULE


def test_an_interval_that_straddles_a_limit_is_unclear():
    assert Change(-0.1, -0.2, -0.05).is_below(-0.04) == "yes"
    assert Change(-0.1, -0.2, -0.05).is_below(-0.06) == "unclear"
    assert Change(-0.1, -0.2, -0.05).is_below(-0.3) == "no"
    assert Change(0.1, 0.05, 0.2).is_above(0.04) == "yes"
    assert Change(math.nan, math.nan, math.nan).is_above(0.0) == "unclear"


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        image = 1 + torch.rand(1, 40, dtype=torch.float64, generator=generator)  # hard and easy ones, at all timesteps
        noise = torch.randn(2, 3, 40, dtype=torch.float64, generator=generator)
        base, other = image + 0.2 * noise[0], 0.9 * image + 0.2 * noise[1]
        interval = change(base, other)
        held += interval.low <= -0.1 <= interval.high
    assert 0.92 <= held / 400 <= 0.98


def test_what_no_diagnosis_can_be_made_of_is_refused():
    for options, message in [
        ({"rates": []}, "rates"),
        ({"timesteps": 1}, "timesteps=1"),
        ({"batch_size": 0}, "batch_size=0"),
    ]:
        with pytest.raises(UserError, match=message):
            diagnosed(Affine(), **options)


@pytest.mark.parametrize("limit", ["training", "data", "capacity", "none_found", "unclear"])
def test_advice_is_commands_that_there_are(one_map, limit):
    shares = "unclear" if limit == "unclear" else "no"
    verdicts = replace(one_map.verdicts, limited_by=limit, shares_too_little=shares)
    found = replace(one_map, verdicts=verdicts)
    for source in ("digits", "some images"):
        config = DiagnoseConfig(data=DataConfig(source, held_out=0.1))
        advice = give_advice(config, found)
        assert len({each.key for each in advice}) == len(advice)
        for each in advice:
            assert each.evidence in (MEASURED, BENCH, UNMEASURED)
            program, command, *arguments = shlex.split(each.command) or ["stagepatch", "", ""]
            assert program == "stagepatch"
            if command:
                app._parse(command, arguments)


def test_ways_to_sample_that_gain_are_advised_the_best_first_and_noise_at_what_it_costs():
    found = diagnosed(Affine(knots=25), steps=2)
    found.free = [
        FreeWin("25 steps", 25.0, 2.0, Change(0.0, 0.0, 0.0), ""),
        FreeWin("25 steps, trailing", 25.0, 1.8, Change(-0.1, -0.12, -0.08), "--trailing"),
        FreeWin("DDPM, 50 steps", 50.0, 1.5, Change(-0.25, -0.3, -0.2), "--ddpm"),
        FreeWin("50 steps", 50.0, 1.9, Change(-0.05, -0.2, 0.1), "--more"),
    ]
    advice = [each for each in give_advice(DiagnoseConfig(), found) if each.key == "sampling"]
    assert [each.command.split()[-1] for each in advice] == ["--ddpm", "--trailing"]
    assert ["recall" in each.why for each in advice] == [True, False]
