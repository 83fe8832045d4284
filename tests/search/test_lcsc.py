"""The strategy for a training's snapshots, on quadratic functions whose best point is known."""

import math

import numpy as np
import optuna
import pytest
import torch

from stagepatch.checkpoints import save_denoiser
from stagepatch.core import UserError
from stagepatch.merging import find_snapshots
from stagepatch.methods import DMP, Finetune, LoRA, load_learned
from stagepatch.search import Evaluation, MergedLearned, SearchConfig, best_of, lcsc
from tests.runs import make_model, make_objective, run
from tests.search.searches import Counted, search

WIDE = {"strategies": ["lcsc"], "low": -1.0}


def trajectory(count, seed=0, width=40):
    """A training's noisy way to its optimum, snapshots and result; the value of weights, and the best there are."""
    generator = np.random.default_rng(seed)
    way = np.exp(-3.0 * np.arange(1, count + 2) / (count + 1))[:, None]
    *snapshots, result = way + 0.5 * generator.standard_normal((count + 1, width))
    vectors = np.stack(snapshots) - result
    best = np.linalg.lstsq(vectors.T, -result, rcond=None)[0]

    def value(weights):
        return float(np.square(result + np.asarray(weights) @ vectors).sum())

    return value, best


def evaluated(strategy, value):
    """What an engine evaluates that begins all that is named."""
    ended = {}
    while len(ended) < len(points := strategy.points(ended, {})):
        ended |= {slot: Evaluation(point, value(point), 0.0) for slot, point in enumerate(points) if slot not in ended}
    return [ended[slot] for slot in range(len(ended))]


def by_nsga(value, starts, count, evaluations):
    """The least value that Optuna's NSGA-II finds from the same starts."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.NSGAIISampler(population_size=10, seed=0))
    for point in starts:
        study.enqueue_trial({f"w{number}": weight for number, weight in enumerate(point)})
    study.optimize(lambda trial: value([trial.suggest_float(f"w{i}", -1, 1) for i in range(count)]), evaluations)
    return study.best_value


@pytest.mark.parametrize(("count", "seed"), [(5, 1), (12, 0)])
def test_it_comes_near_the_best_and_below_all_averages(count, seed):
    value, best = trajectory(count, seed)
    assert min(best) < 0.0
    found = evaluated(lcsc(SearchConfig(evaluations=100, low=-1.0), count), value)
    assert len(found) == 100
    starts = min(one.value for one in found[:10])
    assert best_of(found).value - value(best) < 0.5 * (starts - value(best))
    assert min(best_of(found).point) < 0.0
    assert best_of(found).value < by_nsga(value, [one.point for one in found[:10]], count, 100)


def test_it_goes_on_from_the_best_of_what_it_begins_with():
    for place in (0, 1, 7):
        strategy = lcsc(SearchConfig(evaluations=100, low=-1.0), 6)
        named = strategy.points({}, {})
        assert len(named) == 10
        ended = {slot: Evaluation(point, float(slot != place), 0.0) for slot, point in enumerate(named)}
        generation = strategy.points(ended, {})[10:]
        assert len(generation) == 4 + int(3 * math.log(6))
        distances = np.abs(np.array(generation) - named[place])
        assert 0.02 < distances.mean() < 0.08  # a standard deviation of 0.05: 0.04 on average
        assert distances.max() < 0.25


def test_it_begins_with_the_result_the_mean_and_exponential_averages(tmp_path):
    points = [
        one.point for one in search(tmp_path / "journal", lambda _: 1.0, count=3, evaluations=11, **WIDE)["lcsc"]
    ]
    assert points[:2] == [(0.0,) * 3, (1 / 3,) * 3]
    for point, rate in zip(points[2:10], np.linspace(0.1, 0.95, 8), strict=True):
        average, total = np.zeros(4), 0.0
        for one in np.eye(4):  # three snapshots, and the result
            average, total = rate * average + one, rate * total + 1.0
        np.testing.assert_allclose(point, average[:3] / total)
    assert sum(points[9]) > sum(points[2])


def test_it_goes_on_and_again_alike(tmp_path):
    value, _ = trajectory(4)
    whole, again = (search(tmp_path / name, value, 4, evaluations=18, **WIDE)["lcsc"] for name in ("a", "b"))
    search(tmp_path / "c", value, 4, evaluations=13, **WIDE)
    objective = Counted(value)
    longer = search(tmp_path / "c", objective, 4, evaluations=18, **WIDE)["lcsc"]
    assert [one.point for one in whole] == [one.point for one in again] == [one.point for one in longer]
    assert len(objective.asked) == 5
    other = search(tmp_path / "d", value, 4, evaluations=18, seed=1, **WIDE)["lcsc"]
    assert [one.point for one in other][10:] != [one.point for one in whole][10:]


@pytest.mark.parametrize("prune", [False, True])
def test_combinations_that_are_no_models_are_passed_over(tmp_path, prune):
    value, _ = trajectory(4)

    def objective(point, report=None):
        found = math.inf if sum(point) > 0.8 else value(point)
        if report is not None:
            report(found if math.isfinite(found) else 1e9)
        return found

    found = search(tmp_path / "journal", objective, 4, evaluations=60, prune=prune, **WIDE)["lcsc"]
    assert len(found) == 60
    assert any(one.pruned for one in found) == prune
    finite = [one.value for one in found[:10] if math.isfinite(one.value)]
    assert len(finite) < 10
    assert best_of(found).value < min(finite)


def test_bounds_and_evaluations(tmp_path):
    with pytest.raises(UserError, match=r"search\.evaluations=10 must be above 10"):
        search(tmp_path / "journal", evaluations=10, **WIDE)
    with pytest.raises(UserError, match="two snapshots or more"):
        search(tmp_path / "journal", count=1, evaluations=20, **WIDE)
    narrow = {"strategies": ["lcsc"], "low": -0.1, "high": 0.3}
    found = search(tmp_path / "journal", lambda point: -max(point), evaluations=30, **narrow)["lcsc"]
    assert all(-0.1 <= weight <= 0.3 for one in found for weight in one.point)
    assert max(best_of(found).point) == 0.3


@pytest.mark.parametrize("method", [DMP, LoRA, Finetune])
def test_learned_in_memory_is_what_is_written(tmp_path, batch, method):
    save_denoiser(make_model(), make_objective().scheduler, tmp_path / "base")
    run(tmp_path / "run", method=method(), steps=6, snapshot_every=2)
    snapshots = find_snapshots(tmp_path / "run", str(tmp_path / "base"))
    merged, expected = MergedLearned(snapshots), make_model()
    merged.at([3.0, -3.0])  # nothing of it stays
    snapshots.merge([1.5, -0.5], tmp_path / "out")
    load_learned(expected, tmp_path / "out")
    with torch.no_grad():
        outputs = [model(*batch, return_dict=False)[0] for model in (merged.at([1.5, -0.5]), expected, make_model())]
    assert torch.equal(*outputs[:2])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
