"""One search: strategies choose points of a space, an objective evaluates them, a storage by Optuna keeps all.

What is to be evaluated are numbered slots, trials that wait in a study: a strategy says their points, or leaves them
to one of Optuna's samplers when they are begun. A trial whose process died fails, and its slot is filled with its
point again. So a search goes on after any end, and several processes share one, without a trial too many.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from stagepatch.core import UserError, as_json, check_unchanged
from stagepatch.search.config import ScheduleConfig, SearchConfig
from stagepatch.search.storages import Workers, open_storage

Point = tuple[float, ...]
# An intermediate value of an evaluation [lower is better]; raises what ends it if it is clearly bad.
Report = Callable[[float], None]
_NO_DIFFERENCE = ("batch_size", "num_workers", "max_broken", "in_memory")  # settings that change no image
_POLL = 0.5  # seconds between looks at what other processes do
_CLAIM = 10.0  # seconds in which a process that begins a trial puts its name to it


@dataclass(frozen=True)
class Evaluation:
    """A point's value [lower is better; infinite where it was pruned], and the seconds it took."""

    point: Point
    value: float
    seconds: float
    pruned: bool = False


@dataclass(frozen=True)
class Strategy:
    """What a search evaluates.

    Args:
        name: of the study in the storage.
        settings: that it depends on; a search goes on only with the same.
        points: evaluations that have ended, and all points that were begun, by slot → the points of all slots that can
            be named by now; None where the sampler chooses. It depends on these and on `settings` alone.
        sampler: of Optuna.
        evaluations: how many there will be, where that is known before.
    """

    name: str
    settings: Mapping[str, Any]
    points: Callable[[Mapping[int, Evaluation], Mapping[int, Point]], Sequence[Point | None]]
    sampler: BaseSampler | None = None
    evaluations: int = 0


class _NotWanted(Exception):
    """A trial that another process has, or that belongs to a longer search."""


@dataclass(frozen=True)
class Search:
    """What the strategies of a search share.

    Other processes may work on the same storage; what they have begun is waited for.

    Args:
        config: its name, storage and pruning (MedianPruner) are the search's; its defaults are the values of what a
            former identity lacks.
        output: directory of the journal, where the config names no other storage.
        space: what each number of a point may be.
        objective: to be made small; a function of the point alone. Its second argument is to be called with an
            intermediate value; it is None where nothing is pruned.
        identity: what the objective depends on; a search goes on only with the same.
        on_progress: called with a strategy's name, its evaluations so far, and how many there will be.
    """

    config: SearchConfig | ScheduleConfig
    output: Path
    space: Sequence[FloatDistribution]
    objective: Callable[[Point, Report | None], float]
    identity: Mapping[str, Any]
    on_progress: Callable[[str, list[Evaluation], int], None] = lambda name, ended, total: None

    def run(self, strategies: Sequence[Strategy]) -> dict[str, list[Evaluation]]:
        """Evaluate as much as each strategy asks for, and is not in the storage yet.

        Returns:
            Evaluations by strategy, in the order in which they ended.

        Raises:
            UserError: a storage that cannot be opened, or one with another identity.
        """
        place = self.config.storage or str(self.output / "search.journal")
        with _quiet(), open_storage(place) as (storage, workers):
            runs = [_Run(self, strategy, storage, workers) for strategy in strategies]
            return {run.strategy.name: run.finish() for run in runs}

    def study(self, storage: BaseStorage, strategy: Strategy) -> optuna.Study:
        """Where a strategy's trials are kept.

        Raises:
            UserError: it is of another identity.
        """
        now = {**self.identity, **strategy.settings, "prune": self.config.prune}
        study = optuna.create_study(
            storage=storage,
            study_name=f"{self.config.name} {strategy.name}",
            sampler=strategy.sampler or RandomSampler(),
            pruner=MedianPruner() if self.config.prune else NopPruner(),
            load_if_exists=True,
        )
        check_unchanged(
            {"prune": False, **study.user_attrs.get("identity", as_json(now))},
            now,
            f"The storage of the search '{self.config.name}' holds evaluations of something else",
            "Give another name of the search, or another output_dir or storage.",
            defaults=type(self.config)(),
            ignored=_NO_DIFFERENCE,
        )
        study.set_user_attr("identity", as_json(now))
        return study


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says nothing but errors."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The lowest; the first of several."""
    return min(evaluations, key=lambda evaluation: evaluation.value)


class _Run:
    """One strategy on its study."""

    def __init__(self, search: Search, strategy: Strategy, storage: BaseStorage, workers: Workers | None) -> None:
        self.search, self.strategy, self.storage, self.workers = search, strategy, storage, workers
        self.study = search.study(storage, strategy)
        self.names = [f"w{number}" for number in range(len(search.space))]
        self.slots = 0
        self.nameless: dict[int, float] = {}  # trials that no process has put its name to, and since when

    def finish(self) -> list[Evaluation]:
        """Until all is evaluated, by this process or by another."""
        while True:
            ended, begun = self._state()
            points = self.strategy.points(ended, begun)
            self.slots = len(points)
            evaluations = [evaluation for slot, evaluation in ended.items() if slot < self.slots]
            self.search.on_progress(self.strategy.name, evaluations, self.strategy.evaluations or self.slots)
            if len(evaluations) == self.slots:
                return evaluations
            if self._fail_orphans():
                self._fill(points, begun)
            if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self._evaluate_next()
            else:
                time.sleep(_POLL)

    def _state(self) -> tuple[dict[int, Evaluation], dict[int, Point]]:
        """What has ended, in that order, and all points that are known; by slot."""
        ended: dict[int, Evaluation] = {}
        begun: dict[int, Point] = {}

        def order(trial: FrozenTrial) -> tuple[bool, datetime, int]:
            return trial.state == TrialState.FAIL, trial.datetime_complete or datetime.max, trial.number

        for trial in sorted(self.study.get_trials(deepcopy=False), key=order):
            point, slot = self._point(trial), trial.user_attrs.get("slot")
            if point is None or slot is None:
                continue
            begun.setdefault(slot, point)
            if trial.duration is not None and trial.state != TrialState.FAIL:
                pruned = trial.state == TrialState.PRUNED
                value = math.inf if pruned or trial.value is None else trial.value
                ended.setdefault(slot, Evaluation(point, value, trial.duration.total_seconds(), pruned))
        return ended, begun

    def _point(self, trial: FrozenTrial) -> Point | None:
        params = trial.params if len(trial.params) == len(self.names) else trial.user_attrs.get("params", {})
        return tuple(params[name] for name in self.names) if params else None

    def _fail_orphans(self) -> bool:
        """Fail the trials whose process died; false while there are some of which nobody knows yet."""
        are_known = True
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is None:  # by a clock that nobody sets
                is_orphan = time.monotonic() - self.nameless.setdefault(trial.number, time.monotonic()) > _CLAIM
                are_known &= is_orphan
            else:
                is_orphan = self.workers is not None and self.workers.is_gone(worker)
            if is_orphan:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return are_known

    def _fill(self, points: Sequence[Point | None], begun: Mapping[int, Point]) -> None:
        """Put a trial into the first slot that has none, with the point of one that failed there.

        One at a time: what is chosen next depends on what ended before, which a failed trial must not change.
        """
        trials = self.study.get_trials(deepcopy=False)
        free = sorted({*range(len(points))} - _taken(trials))
        if free and not any(trial.state == TrialState.WAITING for trial in trials):
            point = begun.get(free[0], points[free[0]])
            params = {} if point is None else dict(zip(self.names, point, strict=True))
            self.study.enqueue_trial(params, user_attrs={"slot": free[0], "params": params})

    def _evaluate_next(self) -> None:
        values: list[float] = []

        def value_of(trial: Trial) -> float:
            values.append(self._value_of(trial))
            return values[0]

        try:
            self.study.optimize(value_of, n_trials=1, catch=(_NotWanted,))
        except Exception as error:  # Optuna has several for a trial that is over
            if isinstance(error.__context__, UserError):  # the journal could not be written, and Optuna asserts that
                raise error.__context__ from None
            if not values:
                raise
            # Another process took this one for dead, as after a long pause, and the slot is filled again.

    def _value_of(self, trial: Trial) -> float:
        slot, trials = trial.user_attrs.get("slot", self.slots), self.study.get_trials(deepcopy=False)
        if slot >= self.slots or slot in _taken(trials[: trial.number]):
            raise _NotWanted
        storage = self.storage
        if isinstance(storage, RDBStorage):  # a sign of life before the name: Optuna's thread may give its first later
            study = storage.get_study_id_from_name(self.study.study_name)
            storage.record_heartbeat(storage.get_trial_id_from_study_id_trial_number(study, trial.number))
        trial.set_user_attr("worker", "" if self.workers is None else self.workers.own)
        bounds = zip(self.names, self.search.space, strict=True)
        point = tuple(float(trial.suggest_float(name, each.low, each.high, step=each.step)) for name, each in bounds)
        for evaluation in self._state()[0].values():
            if evaluation.point == point and not evaluation.pruned:
                return evaluation.value

        def report(value: float) -> None:
            trial.report(value, step=0)
            if trial.should_prune():
                raise optuna.TrialPruned

        value = self.search.objective(point, report if self.search.config.prune else None)
        return value if math.isfinite(value) else math.inf


def _taken(trials: Sequence[FrozenTrial]) -> set[int | None]:
    """The slots that need no further trial."""
    return {trial.user_attrs.get("slot") for trial in trials if trial.state != TrialState.FAIL}
