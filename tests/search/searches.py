"""Searches on toy objectives, in this process or in one that may die."""

import os
import signal
import time

from optuna.distributions import FloatDistribution

from stagepatch.cli import main
from stagepatch.evaluation import Evaluator
from stagepatch.methods import LoRAConfig, MethodConfig, make_method
from stagepatch.search import Evaluation, Search, SearchConfig, Space, evolution, storages, weight_strategies
from tests.runs import draw_weights

OPTIMUM = [0.62, 0.15, 0.4]
SPACE = Space((1.0, 0.5, 0.25), 6, 3.0)


def quadratic(point):
    return sum((weight - best) ** 2 for weight, best in zip(point, OPTIMUM, strict=False))


class Counted:
    """An objective that remembers what it was asked."""

    def __init__(self, objective=quadratic):
        self.objective, self.asked = objective, []

    def __call__(self, point, report=None):
        self.asked.append(tuple(point))
        return self.objective(point)


def search(path, objective=quadratic, count=2, identity=None, on_progress=lambda *_: None, **options):
    """Evaluations by strategy; 'evolution', of toy model schedules, goes alone."""
    config = SearchConfig(**{"strategies": ["tpe"], "evaluations": 12, "storage": str(path), **options})
    if config.strategies == ["evolution"]:
        strategies = [evolution(SPACE, config.evaluations, 0)]
        space = [FloatDistribution(-1, 2, step=1)] * SPACE.steps
    else:
        strategies = weight_strategies(config, count)
        space = [FloatDistribution(config.low, config.high)] * count

    def evaluate(point, report):
        return objective(point) if report is None else objective(point, report)

    return Search(config, None, space, evaluate, identity or {}, on_progress).run(strategies)


def save_learned(name, model, directory, seed=0, rank=2):
    """What a method would learn, drawn at random."""
    method = make_method(MethodConfig(name, lora=LoRAConfig(rank)))
    (group,) = method.prepare(model)
    draw_weights(group["params"], seed=seed)
    method.save(directory)


def alone(strategy, error, stop=None):
    """What an engine with nobody beside it evaluates."""
    ended = {}
    while len(ended) != stop:
        points = strategy.points(ended, {slot: evaluation.point for slot, evaluation in ended.items()})
        if len(points) == len(ended):
            break
        ended[len(ended)] = Evaluation(points[-1], error(points[-1]), 0.0)
    return list(ended.values())


def note(log, *words):
    with open(log, "a") as file:
        print(*words, file=file)


def search_job(directory, strategies=("grid", "tpe", "cma"), kind="journal", dies_at=0, seconds=0, grace=60, count=15):
    """A search for a process of its own, which kills itself in its evaluation number `dies_at`; prints its points."""
    storages._HEARTBEAT, storages._GRACE = 1, grace

    def objective(point):
        note(directory / "log", "begin", os.getpid(), point)
        time.sleep(seconds)
        if len(counted.asked) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        note(directory / "log", "end", os.getpid(), point)
        return sum((number - 0.3) ** 2 for number in point)

    counted = Counted(objective)
    storage = directory / "journal" if kind == "journal" else f"sqlite:///{directory / 'search.db'}"
    found = search(storage, counted, strategies=list(strategies), evaluations=count)
    print({name: [one.point for one in ended] for name, ended in found.items()})


def schedule_job(arguments, log, dies_at=0):
    """`stagepatch schedule` for a process of its own, which kills itself in its evaluation number `dies_at`."""
    sample, asked = Evaluator.sample, []

    def noted(evaluator, model, scheduler, sampling, *more):
        if sampling.seed == 0:
            asked.append(sampling)
            if len(asked) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            note(log, os.getpid())
        return sample(evaluator, model, scheduler, sampling, *more)

    Evaluator.sample = noted
    return main(arguments)
