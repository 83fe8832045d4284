"""A search for the weights of a merge: a grid of two levels (DeMe, arXiv 2410.06664, supplement), TPE, CMA-ES."""

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, TPESampler
from optuna.trial import FrozenTrial
from torch import nn

from stagepatch.checkpoints import add_projections, find_model, load_denoiser, model_fingerprint, weights_fingerprint
from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core import TensorReader, UserError, processes
from stagepatch.data import fit_to_model
from stagepatch.evaluation import Evaluator
from stagepatch.merging import MergeMethod, Snapshots, Stages, combine, combine_loras
from stagepatch.merging.config import SUM
from stagepatch.merging.lora import read_loras
from stagepatch.merging.models import open_all, piece_size
from stagepatch.methods import LoRA, load_learned
from stagepatch.methods.lora import ADAPTER
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.search.config import MergeConfig, SearchConfig
from stagepatch.search.engine import Evaluation, Point, Report, Search, Strategy
from stagepatch.search.lcsc import lcsc
from stagepatch.search.objective import SampledMetric, check_alone, run_search

NAMES = ("grid", "tpe", "cma", "lcsc")


class MergedModel:
    """A model that is overwritten for each weights by what `merge_models` would write.

    Base and stages are held on the CPU as their files hold them.

    Attributes:
        scheduler: the one the base was trained with.

    Raises:
        UserError: a stage of another architecture, by name of what differs.
    """

    def __init__(self, stages: Stages | Snapshots, method: MergeMethod = SUM) -> None:
        readers = open_all(find_model(stages.base), stages.directories)
        names = list(readers[0].shapes)
        model, self.scheduler = load_denoiser(stages.base)
        numbers = [int(name.split(".")[-1]) for name in names if name.startswith(f"{PROJECTION}.")]
        if numbers and not hasattr(model, PROJECTION):
            add_projections(model, numbers)
        self._model: nn.Module = model.to(processes().device)
        self._parts = {name: [reader.read(name) for reader in readers] for name in names}
        self._method = method

    @torch.no_grad()
    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        own = self._model.state_dict()
        for name, parts in self._parts.items():
            size = piece_size(parts[0].shape, self._method)
            pieces = [tensor.view(-1).split(size) for tensor in (own[name], *parts)]
            for target, base, *stages in zip(*pieces, strict=True):
                target.copy_(combine(base, stages, weights, self._method, name))
        return self._model


class MergedLoRA:
    """The base with one LoRA, which for each weights is what `merge_loras` would write."""

    def __init__(self, stages: Stages | Snapshots, method: MergeMethod = SUM) -> None:
        self._method = method
        self._config, self._loras = read_loras(stages.directories)
        model, self.scheduler = load_denoiser(stages.base)
        LoRA(self._config).prepare(model)
        self._model: nn.Module = model.to(processes().device)

    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        from peft.utils import set_peft_model_state_dict

        merged = combine_loras(self._loras, weights, self._method)
        state = {name.split(".", 1)[1]: tensor for name, tensor in merged.items()}  # its first part names the denoiser
        set_peft_model_state_dict(self._model, state, adapter_name=ADAPTER)
        return self._model


class MergedLearned:
    """A model with what was learned on it, which for each weights is what `Snapshots.merge` would write."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        model, self.scheduler = load_denoiser(snapshots.base)
        self._model: nn.Module = model.to(processes().device)
        self._method = load_learned(self._model, snapshots.run)

    def at(self, weights: Sequence[float]) -> nn.Module:
        """The model at these weights: always the same object."""
        with TemporaryDirectory() as directory:
            self._snapshots.merge(weights, Path(directory))
            self._method.load(self._model, Path(directory))
        return self._model


def _merged(stages: Stages | Snapshots, method: MergeMethod) -> MergedModel | MergedLoRA | MergedLearned:
    if isinstance(stages, Snapshots) and stages.model:
        stages.check_method(method)
        return MergedLearned(stages)
    return (MergedLoRA if stages.are_loras else MergedModel)(stages, method)


def search_weights(config: MergeConfig, stages: Stages | Snapshots) -> dict[str, list[Evaluation]]:
    """The evaluations of each strategy.

    Raises:
        UserError: settings that cannot be, a stage of another architecture, data or an extractor that cannot be had,
            a storage of another search, or a process of a launch.
    """
    check_alone("merge")
    options, output, count = config.search, Path(config.output_dir), len(stages.directories)
    strategies = weight_strategies(options, count)
    merged = _merged(stages, config.method)
    cache = Path(config.cache or output / "cache")
    evaluator = Evaluator.load(stages.base, config.data, config.extractor, cache, config.held_out)
    metric = SampledMetric(evaluator, options.metric)

    def objective(weights: Point, report: Report | None) -> float:
        return metric(merged.at(weights), merged.scheduler, config.sampling, report)

    def fingerprint(stage: Path) -> str:
        if isinstance(stages, Snapshots):
            return stages.fingerprint(stage)
        is_lora = stages.are_loras
        return weights_fingerprint(TensorReader([stage / LORA_FILE])) if is_lora else model_fingerprint(stage)

    identity = {
        "base": model_fingerprint(find_model(stages.base)),
        "stages": [fingerprint(stage) for stage in stages.directories],
        **{name: getattr(config, name) for name in ("ties_keep", "extractor", "sampling")},
        "data": replace(config.data, image_size=fit_to_model(config.data, stages.base).image_size),
        **({"dare": [config.method.kind, config.dare_drop, config.seed]} if config.dare_drop else {}),
        **{name: getattr(options, name) for name in ("metric", "low", "high")},
    }
    if isinstance(stages, Snapshots):
        identity["result"] = stages.fingerprint(stages.run)
    space = [FloatDistribution(options.low, options.high)] * count
    return run_search(Search(options, output, space, objective, identity), strategies, metric)


def weight_strategies(config: SearchConfig, count: int) -> list[Strategy]:
    """The strategies of a config, each beginning with the base and the mean.

    Args:
        count: number of weights.

    Raises:
        UserError: settings that cannot be, by name.
    """
    unknown = [name for name in config.strategies if name not in NAMES]
    if unknown or len(set(config.strategies)) < len(config.strategies):
        raise UserError(f"search.strategies={config.strategies} must be some of {', '.join(NAMES)}, once each.")
    if not config.low <= 0.0 < config.high:
        raise UserError(f"search.low={config.low} and high={config.high} must have low ≤ 0 < high: 0 is the base.")
    if config.strategies != ["lcsc"] and not all(config.low <= weight <= config.high for weight in config.coarse):
        raise UserError(f"search.coarse={config.coarse} must be within low={config.low} and high={config.high}.")
    starts: list[Point] = [(0.0,) * count, (min(1.0 / count, config.high),) * count]
    if config.evaluations < len(starts):
        raise UserError(f"search.evaluations={config.evaluations} must be 2 or more: the base and the mean are two.")
    needs = [name for name in config.strategies if name in ("cma", "lcsc")]
    if needs and importlib.util.find_spec("cmaes") is None:
        raise UserError(f"The strategy '{needs[0]}' needs cmaes: pip install 'stagepatch[search]'.")
    points = [*starts, *[None] * (config.evaluations - len(starts))]
    samplers = {
        "tpe": _seeded(TPESampler, config.seed, multivariate=True, constant_liar=True),
        "cma": _seeded(CmaEsSampler, config.seed),
    }

    def make(name: str) -> Strategy:
        if name == "grid":
            return _grid(config, starts)
        if name == "lcsc":
            return lcsc(config, count)
        return Strategy(name, {"seed": config.seed}, lambda ended, begun: points, samplers[name])

    return [make(name) for name in config.strategies]


def _grid(config: SearchConfig, starts: list[Point]) -> Strategy:
    count = len(starts[0])
    coarse = list(dict.fromkeys([*starts, *itertools.product(config.coarse, repeat=count)]))

    def around(best: Point) -> Iterator[Point]:
        for offsets in itertools.product(config.fine, repeat=count):
            moved = (weight + offset for weight, offset in zip(best, offsets, strict=True))
            yield tuple(round(min(max(weight, config.low), config.high), 10) for weight in moved)

    def points(ended: Mapping[int, Evaluation], begun: Mapping[int, Point]) -> list[Point]:
        if any(slot not in ended for slot in range(len(coarse))):
            return coarse
        best = min(range(len(coarse)), key=lambda slot: ended[slot].value)
        return list(dict.fromkeys([*coarse, *around(coarse[best])]))

    return Strategy("grid", {"coarse": config.coarse, "fine": config.fine}, points)


def _seeded(kind: type[BaseSampler], seed: int, **options: Any) -> BaseSampler:
    """A sampler whose seed is of the slot: the same after a restart, another beside another process."""

    class SeededBySlot(kind):  # type: ignore[valid-type, misc]
        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            slot = trial.user_attrs.get("slot", trial.number)
            super().__init__(seed=(1_000_003 * seed + slot) % 2**32, **options)
            super().before_trial(study, trial)

    sampler: BaseSampler = SeededBySlot(seed=seed, **options)
    return sampler
