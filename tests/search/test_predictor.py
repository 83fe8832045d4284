"""The learned predictor of OMS-DPM: its loss by hand, what it ranks, and the search that it leads."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from scipy.stats import kendalltau

from stagepatch.cli import main
from stagepatch.core import read_json, write_json
from stagepatch.search import (
    NONE,
    ScheduleConfig,
    SchedulePredictor,
    Space,
    Zoo,
    ZooEntry,
    best_of,
    fit_predictor,
    predicted_evolution,
    ranking_loss,
)
from stagepatch.search.predictor import predicted_best
from tests.sampling.test_generate import SCHEDULER
from tests.search.searches import alone
from tests.search.test_model_schedule import COSTS, all_within, found, models, toy, write_costs

__all__ = ["models"]  # a fixture


def timesteps_of(steps):
    return [999.0 - 1000.0 / steps * step for step in range(steps)]


def drawn(space, count, seed=0):
    """Schedules at random, no two alike."""
    draw, schedules = random.Random(seed), {}
    while len(schedules) < count:
        schedules[space.repaired(tuple(draw.choices(space.options(), k=space.steps)), draw)] = None
    return list(schedules)


def test_ranking_loss_by_hand():
    scores, values = torch.tensor([0.2, 0.9, -0.5]), torch.tensor([3.0, 1.0, 2.0])
    # (0, 1): 1 − (0.2 − 0.9) = 1.7; (0, 2): 1 − (0.2 + 0.5) = 0.3; (1, 2): 1 + (0.9 + 0.5) = 2.4
    assert float(ranking_loss(scores, values)) == pytest.approx((1.7 + 0.3 + 2.4) / 3)
    assert float(ranking_loss(scores, values, margin=0.5)) == pytest.approx((1.2 + 0.0 + 1.9) / 3)
    assert float(ranking_loss(scores, values, threshold=1.0)) == pytest.approx(1.7)
    assert float(ranking_loss(scores, torch.ones(3))) == 0.0
    assert float(ranking_loss(10 * values, values)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_ranking_loss_and_its_gradient_in_float64(seed):
    generator = np.random.default_rng(seed)
    scores, values = generator.normal(size=7), generator.integers(0, 4, size=7).astype(float)
    pairs = [(i, j) for i, j in itertools.permutations(range(7), 2) if values[i] > values[j]]
    expected, gradient = 0.0, np.zeros(7)
    for worse, better in pairs:
        loss = 1.0 - (scores[worse] - scores[better])
        if loss > 0.0:
            expected += loss / len(pairs)
            gradient[worse] -= 1.0 / len(pairs)
            gradient[better] += 1.0 / len(pairs)
    given = torch.tensor(scores, requires_grad=True)
    loss = ranking_loss(given, torch.tensor(values))
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    np.testing.assert_allclose(given.grad, gradient, atol=1e-12)


def test_it_is_an_lstm_over_the_models_and_timesteps_of_the_steps():
    torch.manual_seed(0)
    predictor, schedules = SchedulePredictor([900.0, 500.0, 100.0], 2), torch.tensor([[0, NONE, 1], [1, 1, 1]])
    weights = {name: value.double().numpy() for name, value in predictor.state_dict().items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for schedule, score in zip(schedules.tolist(), predictor(schedules).tolist(), strict=True):
        hidden, cell, states = np.zeros(128), np.zeros(128), []
        for choice, timestep in zip(schedule, (900.0, 500.0, 100.0), strict=True):
            angles = timestep * np.exp(-math.log(10000) / 63 * np.arange(64))
            first = linear("timestep.linear_1", np.concatenate([np.sin(angles), np.cos(angles)]))
            step = np.concatenate(
                [weights["model.weight"][choice + 1], linear("timestep.linear_2", first * sigmoid(first))]
            )
            gates = step @ weights["lstm.weight_ih_l0"].T + weights["lstm.bias_ih_l0"]
            gates += hidden @ weights["lstm.weight_hh_l0"].T + weights["lstm.bias_hh_l0"]
            let_in, keep, new, out = np.split(gates, 4)
            cell = sigmoid(keep) * cell + sigmoid(let_in) * np.tanh(new)
            hidden = sigmoid(out) * np.tanh(cell)
            states.append(hidden / np.linalg.norm(hidden))
        x = np.mean(states, axis=0)
        x = x / np.linalg.norm(x)
        for layer in (0, 2, 4):
            x = np.maximum(linear(f"head.{layer}", x), 0.0)
        assert score == pytest.approx(float(linear("head.6", x)[0]), abs=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_it_ranks_a_zoo_that_it_has_not_seen(seed):
    space, error = Space(COSTS, 8, 5.0), toy(8, seed)
    schedules = drawn(space, 160)
    known = {choices: error(choices) for choices in schedules[:80]}
    known[schedules[0]] = math.inf  # is not learned from
    unseen, true = torch.tensor(schedules[80:]), [error(choices) for choices in schedules[80:]]
    state = torch.get_rng_state()

    def tau(epochs):
        with torch.no_grad():
            return kendalltau(fit_predictor(known, timesteps_of(8), 3, seed, epochs)(unseen), true).statistic

    assert tau(60) > 0.6
    assert tau(0) < 0.4
    assert torch.equal(torch.get_rng_state(), state)


def test_evolution_finds_what_a_score_is_lowest_for_within_the_budget():
    space, error = Space(COSTS, 7, 3.5), toy(7, 1)
    everything = {choices: error(choices) for choices in all_within(space)}
    known = {choices: everything[choices] for choices in drawn(space, 20)}

    def score(schedules):
        return torch.tensor([error(tuple(schedule)) for schedule in schedules.tolist()])

    ranked = predicted_best(space, score, known, random.Random(0))
    assert not set(ranked) & set(known)
    assert all(space.holds(space.seconds(choices)) for choices in ranked)
    assert everything[ranked[0]] == min(everything.values())
    assert [everything[choices] for choices in ranked] == sorted(everything[choices] for choices in ranked)


def test_the_known_best_is_found_in_a_fraction_of_the_grid():
    space, error = Space(COSTS, 5, 2.5), toy(5, 0)
    everything = {choices: error(choices) for choices in all_within(space)}
    best = min(everything, key=everything.__getitem__)
    search = alone(predicted_evolution(space, timesteps_of(5), 90, 30, 0), error)
    asked = [one.point for one in search]
    assert len(everything) > 400
    assert len(set(asked)) == 90
    assert all(space.holds(space.seconds(choices)) for choices in asked)
    assert asked.index(best) < 90
    assert best not in asked[: len(space.starts()) + 30]
    assert best_of(search).value == everything[best]


@pytest.fixture(scope="module")
def whole_search():
    return alone(predicted_evolution(Space(COSTS, 6, 3.0), timesteps_of(6), 28, 12, 5), toy(6))


@pytest.mark.parametrize("stop", [0, 12, 15, 20, 27])
def test_a_search_that_stopped_goes_on_as_it_would_have(whole_search, stop):
    whole = whole_search
    strategy = predicted_evolution(Space(COSTS, 6, 3.0), timesteps_of(6), 28, 12, 5)  # it remembers nothing
    ended = dict(enumerate(whole[:stop]))
    points = strategy.points(ended, {slot: one.point for slot, one in ended.items()})
    assert points == [one.point for one in whole[: stop + 1]]


def test_a_small_space_is_searched_through_and_samples_that_are_no_numbers_stop_nothing():
    space = Space(COSTS, 3, 1.0)
    search = alone(predicted_evolution(space, timesteps_of(3), 10_000, 5, 0), lambda choices: math.inf)
    assert {one.point for one in search} == set(all_within(space))


def test_command_learns_from_random_schedules_and_proposes_the_rest(models, tmp_path, capsys):
    arguments = [*models, "--predictor=lstm", "--random_evaluations=4", "--evaluations=9"]
    write_costs(tmp_path / "out", base=1.0, small=0.2, patched=1.0)
    assert main(arguments) == 0
    first = found(tmp_path)
    assert len({tuple(each["schedule"]) for each in first}) == 9
    assert all(each["seconds"] <= 3.0 for each in first)
    assert main([*arguments, "--evaluations=10"]) == 0
    assert found(tmp_path)[:9] == first
    assert (tmp_path / "out" / "schedule.yaml").exists()
    capsys.readouterr()
    assert main([*arguments, "--random_evaluations=5"]) == 2
    assert "random_evaluations was 4, is 5" in capsys.readouterr().err


def zoo_of(tmp_path, base, **changes):
    zoo = [ZooEntry("small", str(tmp_path / "small"))]
    config = ScheduleConfig(output_dir=str(tmp_path / "out"), zoo=zoo, **changes)
    config.sampling.num_inference_steps, config.sampling.num_images = 6, 8
    return Zoo(config, base, SCHEDULER, None)


@pytest.mark.usefixtures("models")
def test_a_budget_in_milliseconds_counts_the_sampler_too(tiny_dit, tmp_path):
    base = tiny_dit(0, learn_sigma=False)
    write_json(tmp_path / "out" / "costs.json", {"seconds": {"base": 0.002, "small": 0.001}, "besides": 0.0005})
    space = zoo_of(tmp_path, base, budget_ms=9.0).space
    assert space.costs == pytest.approx((0.0025, 0.0015))
    assert space.budget == pytest.approx(0.009)
    assert space.evenly(0).count(0) == 3  # 4 without the sampler
    assert space.evenly(1).count(1) == 6
    # A share of the base's time leaves it out, as ever.
    assert zoo_of(tmp_path, base, budget=0.5).space.costs == (0.002, 0.001)
    assert zoo_of(tmp_path, base, budget=0.5).share == pytest.approx(0.5)


@pytest.mark.usefixtures("models")
def test_the_sampler_s_time_is_measured_without_the_models(tiny_dit, tmp_path, monkeypatch):
    base, now, step = tiny_dit(0, learn_sigma=False), [0.0], DPMSolverMultistepScheduler.step

    def slow_step(*args, **kwargs):
        now[0] += 3.0
        return step(*args, **kwargs)

    def slow_layer(*args):
        now[0] += 100.0

    monkeypatch.setattr("stagepatch.search.schedule_search._now", lambda: now[0])
    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", slow_step)
    next(module for module in base.modules() if not list(module.children())).register_forward_hook(slow_layer)
    zoo = zoo_of(tmp_path, base, budget_ms=1e6)
    costs = read_json(tmp_path / "out" / "costs.json")
    assert (costs["seconds"]["base"], costs["besides"]) == (100.0 / 8, 3.0 / 8)
    assert zoo.space.costs == (103.0 / 8, 3.0 / 8)
    assert "forward" not in vars(base)


def test_command_keeps_to_a_budget_in_milliseconds(models, tmp_path, capsys):
    costs = {"seconds": {"base": 0.002, "small": 0.001, "patched": 0.002}, "besides": 0.0005}
    write_json(tmp_path / "out" / "costs.json", costs)
    assert main([*models, "--budget_ms=6"]) == 0
    for each in found(tmp_path):
        kept = [name for name in each["schedule"] if name is not None]
        assert each["seconds"] == pytest.approx(sum(costs["seconds"][name] + 0.0005 for name in kept))
        assert each["seconds"] <= 0.006 * (1 + 1e-9)
    printed = capsys.readouterr().out
    assert "Budget: 0.006 s per image, 40% of the base model's 6 steps." in re.sub(r"\s+", " ", printed)
    assert "base, 2 steps" in printed
    assert "within 0.4 of its time at 6 steps" in (tmp_path / "out" / "schedule.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget_ms=-1"], "budget_ms=-1.0 must be at least 0"),
        (["--budget_ms=0.0001"], "Give a larger budget"),
        (["--predictor=gbdt"], "predictor"),
        (
            ["--predictor=lstm", "--random_evaluations=7"],
            "random_evaluations=7 must be at least 1 and below evaluations=7",
        ),
        (["--predictor=lstm", "--random_evaluations=0"], "must be at least 1"),
    ],
)
def test_mistakes_are_named(models, capsys, changes, message):
    assert main([*models, *changes]) == 2
    assert message in capsys.readouterr().err


def test_costs_of_before_lack_the_sampler_s_time(models, tmp_path, capsys):
    write_costs(tmp_path / "out", base=1.0, small=0.2, patched=1.0)
    assert main([*models, "--budget_ms=6000"]) == 2
    assert "has not what sampling takes besides the models: delete it" in capsys.readouterr().err
