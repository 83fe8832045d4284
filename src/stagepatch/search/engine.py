"""A search for weights by Optuna: a grid of two levels (DeMe, arXiv 2410.06664, supplement), TPE, CMA-ES.

What is to be evaluated are numbered slots, trials that wait in the study: a grid's have their weights, the others get
theirs from the sampler when they are begun. A trial whose process died fails, and its slot is filled with its weights
again. So a search goes on after any end, and several processes share one, without a trial too many.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from stagepatch.core.errors import UserError
from stagepatch.core.settings import as_json, check_unchanged
from stagepatch.search.config import SearchConfig
from stagepatch.search.storages import Workers, open_storage, quiet_optuna

STRATEGIES = ("grid", "tpe", "cma")
Slots = list[list[float]]  # of all stages, or empty where the sampler chooses
Progress = Callable[[str, list["Evaluation"], int], None]
_NO_DIFFERENCE = ("batch_size", "num_workers", "max_broken")  # settings that change no image
_POLL = 0.5  # seconds between looks at what other processes do
_CLAIM = 10.0  # seconds in which a process that begins a trial puts its name to it


@dataclass(frozen=True)
class Evaluation:
    """An objective's value [lower is better] at weights, and the seconds it took."""

    weights: list[float]
    value: float
    seconds: float


class _NotWanted(Exception):
    """A trial that another process has, or that belongs to a longer search."""


def search_weights(
    objective: Callable[[list[float]], float],
    count: int,
    config: SearchConfig,
    storage: str,
    identity: Mapping[str, Any],
    on_progress: Progress = lambda strategy, done, total: None,
) -> dict[str, list[Evaluation]]:
    """Evaluate as much as each strategy asks for, and is not in the storage yet.

    Other processes may work on the same storage; what they have begun is waited for.

    Args:
        objective: to be made small; a function of the weights alone.
        count: number of weights.
        storage: a database's URL, or a journal file.
        identity: what the objective depends on; a search goes on only with the same.
        on_progress: called with a strategy, its evaluations so far, and how many there will be.

    Returns:
        Evaluations of each strategy, in the order in which they ended.

    Raises:
        UserError: settings that cannot be, a storage that cannot be opened, or one with another identity.
    """
    check_search(config, count)
    with quiet_optuna(), open_storage(storage) as (opened, workers):
        found: dict[str, list[Evaluation]] = {}
        for strategy in config.strategies:
            study = _study(opened, storage, strategy, config, identity)
            found[strategy] = _Search(study, strategy, objective, count, config, workers, on_progress).run()
        return found


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The lowest; the first of several."""
    return min(evaluations, key=lambda evaluation: evaluation.value)


def check_search(config: SearchConfig, count: int) -> None:
    """Refuse settings that cannot be.

    Raises:
        UserError: by name of the setting.
    """
    unknown = [strategy for strategy in config.strategies if strategy not in STRATEGIES]
    if unknown or len(set(config.strategies)) < len(config.strategies):
        raise UserError(f"search.strategies={config.strategies} must be some of {', '.join(STRATEGIES)}, once each.")
    if not config.low <= 0.0 < config.high:
        raise UserError(f"search.low={config.low} and high={config.high} must have low ≤ 0 < high: 0 is the base.")
    if not all(config.low <= weight <= config.high for weight in config.coarse):
        raise UserError(f"search.coarse={config.coarse} must be within low={config.low} and high={config.high}.")
    if config.evaluations < len(_starts(count, config)):
        raise UserError(f"search.evaluations={config.evaluations} must be 2 or more: the base and the mean are two.")
    if "cma" in config.strategies and importlib.util.find_spec("cmaes") is None:
        raise UserError("The strategy 'cma' needs cmaes: pip install 'stagepatch[search]'.")


def _starts(count: int, config: SearchConfig) -> Slots:
    return [[0.0] * count, [min(1.0 / count, config.high)] * count]


class _Search:
    """One strategy on its study."""

    def __init__(
        self,
        study: optuna.Study,
        strategy: str,
        objective: Callable[[list[float]], float],
        count: int,
        config: SearchConfig,
        workers: Workers | None,
        on_progress: Progress,
    ) -> None:
        self.study, self.strategy, self.objective = study, strategy, objective
        self.count, self.config = count, config
        self.workers, self.on_progress = workers, on_progress
        self.slots: Slots = []

    def run(self) -> list[Evaluation]:
        """All of it, or what is left."""
        starts = _starts(self.count, self.config)
        if self.strategy != "grid":
            return self._evaluate(starts + [[]] * (self.config.evaluations - len(starts)))
        coarse = _unique([*starts, *map(list, itertools.product(self.config.coarse, repeat=self.count))])
        self._evaluate(coarse)
        done = self._done()
        best = coarse[min(done, key=lambda slot: (done[slot].value, slot))]
        return self._evaluate(_unique([*coarse, *self._around(best)]))

    def _around(self, best: Sequence[float]) -> Iterator[list[float]]:
        for offsets in itertools.product(self.config.fine, repeat=self.count):
            yield [
                round(min(max(weight + offset, self.config.low), self.config.high), 10)
                for weight, offset in zip(best, offsets, strict=True)
            ]

    def _evaluate(self, slots: Slots) -> list[Evaluation]:
        """Until all slots are done, by this process or by another."""
        self.slots = slots
        while len(done := self._done()) < len(slots):
            self._report(done)
            self._fail_orphans()
            self._fill()
            if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self._evaluate_next()
            else:
                time.sleep(_POLL)
        return self._report(done)

    def _done(self) -> dict[int, FrozenTrial]:
        """Finished trials by slot."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {slot: trial for trial in trials if (slot := trial.user_attrs["slot"]) < len(self.slots)}

    def _report(self, done: Mapping[int, FrozenTrial]) -> list[Evaluation]:
        trials = sorted(done.values(), key=lambda trial: (trial.datetime_complete or datetime.max, trial.number))
        evaluations = [
            Evaluation(self._weights(trial.params), trial.value, trial.duration.total_seconds())
            for trial in trials
            if trial.value is not None and trial.duration is not None
        ]
        self.on_progress(self.strategy, evaluations, len(self.slots))
        return evaluations

    def _weights(self, params: Mapping[str, float]) -> list[float]:
        return [params[f"w{number}"] for number in range(self.count)]

    def _fail_orphans(self) -> None:
        """Fail the trials whose process died."""
        optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_orphan(trial):
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get("worker")
        if worker is None:
            begun = trial.datetime_start or datetime.min
            return (datetime.now() - begun).total_seconds() > _CLAIM
        return self.workers is not None and self.workers.is_gone(worker)

    def _fill(self) -> None:
        """Put a trial into each slot that has none, with the weights of one that failed there."""
        trials = self.study.get_trials(deepcopy=False)
        taken = {trial.user_attrs.get("slot") for trial in trials if trial.state != TrialState.FAIL}
        for slot, weights in enumerate(self.slots):
            if slot in taken:
                continue
            params = {f"w{number}": weight for number, weight in enumerate(weights)}
            for trial in trials:
                if trial.user_attrs.get("slot") == slot and len(trial.params) == self.count:
                    params = trial.params
            self.study.enqueue_trial(params, user_attrs={"slot": slot})

    def _evaluate_next(self) -> None:
        valued: list[int] = []

        def value_of(trial: Trial) -> float:
            value = self._value_of(trial)
            valued.append(trial.number)
            return value

        try:
            self.study.optimize(value_of, n_trials=1, catch=(_NotWanted,))
        except Exception:  # Optuna has several for a trial that is over
            trials = self.study.get_trials(deepcopy=False)
            if not any(trials[number].state == TrialState.FAIL for number in valued):
                raise
            # Another process took this one for dead, as after a long pause, and the slot is filled again.

    def _value_of(self, trial: Trial) -> float:
        slot = trial.user_attrs.get("slot", len(self.slots))
        earlier = self.study.get_trials(deepcopy=False)[: trial.number]
        is_taken = any(other.user_attrs.get("slot") == slot and other.state != TrialState.FAIL for other in earlier)
        if is_taken or slot >= len(self.slots):
            raise _NotWanted
        trial.set_user_attr("worker", "" if self.workers is None else self.workers.own)
        low, high = self.config.low, self.config.high
        weights = [trial.suggest_float(f"w{number}", low, high) for number in range(self.count)]
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if self._weights(other.params) == weights and other.value is not None:
                return other.value
        value = self.objective(weights)
        return value if math.isfinite(value) else math.inf


def _unique(slots: Slots) -> Slots:
    return [list(weights) for weights in dict.fromkeys(map(tuple, slots))]


class _SeededByNumber(BaseSampler):
    """A sampler whose seed is of the trial: it draws other numbers after a restart, and beside another process."""

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make, self._sampler = make, make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def _sampler(strategy: str, seed: int) -> BaseSampler:
    def make(number: int) -> BaseSampler:
        own = (1_000_003 * seed + number) % 2**32
        if strategy == "tpe":
            return TPESampler(seed=own, multivariate=True, constant_liar=True)
        return CmaEsSampler(seed=own) if strategy == "cma" else RandomSampler(seed=own)

    return _SeededByNumber(make)


def _study(
    opened: optuna.storages.BaseStorage, storage: str, strategy: str, config: SearchConfig, identity: Mapping[str, Any]
) -> optuna.Study:
    own: dict[str, Any] = {"low": config.low, "high": config.high}
    own |= {"coarse": config.coarse, "fine": config.fine} if strategy == "grid" else {"seed": config.seed}
    now = {**identity, **own}
    study = optuna.create_study(
        storage=opened,
        study_name=f"{config.name} {strategy}",
        sampler=_sampler(strategy, config.seed),
        load_if_exists=True,
    )
    check_unchanged(
        study.user_attrs.get("identity", as_json(now)),
        now,
        f"The storage of the search '{config.name}' holds evaluations of something else",
        "Give another search.name, or another output_dir or search.storage.",
        ignored=_NO_DIFFERENCE,
    )
    study.set_user_attr("identity", as_json(now))
    return study
