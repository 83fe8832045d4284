"""Merge stages, by the weights of the config or by those that a search finds."""

import importlib.util
from itertools import chain
from pathlib import Path

from filelock import FileLock

from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG
from stagepatch.core import UserError, write_text
from stagepatch.merging import Snapshots, Stages, find_snapshots, find_stages, merge_posthoc


def merge(config: configs.MergeConfig, resolved: str) -> None:
    """Merge stages, a tensor at a time; with a search, first find the weights."""
    output = Path(config.output_dir)
    if not 0.0 <= config.ties_keep <= 1.0:
        raise UserError(f"ties_keep={config.ties_keep} must be a share from 0 to 1.")
    if config.posthoc_ema:
        _average(config)
        write_text(output / RUN_CONFIG, resolved)
        return
    stages = _find(config)
    if stages.are_loras and config.ties_keep:
        raise UserError("TIES-merging of LoRAs would not be a LoRA: set ties_keep to 0.")
    if config.search.strategies:
        _search_and_merge(config, stages)
    else:
        stages.merge(config.weights, output, config.ties_keep)
    write_text(output / RUN_CONFIG, resolved)
    if isinstance(stages, Snapshots) and stages.model:
        print(f"The merged result of the run is in '{output}'.")
    else:
        print(f"The merged {'LoRA' if stages.are_loras else 'model'} is in '{output}'.")


def _find(config: configs.MergeConfig) -> Stages | Snapshots:
    if not config.run:
        return find_stages(config.base, config.stages, needs_base=bool(config.search.strategies))
    if config.stages:
        raise UserError("Give stages, or a run whose snapshots are the stages, not both.")
    return find_snapshots(config.run, config.base)


def _average(config: configs.MergeConfig) -> None:
    if not config.run:
        raise UserError(f"posthoc_ema={config.posthoc_ema} is of a training's averages: give run, its directory.")
    if config.weights or config.stages or config.search.strategies or config.ties_keep:
        raise UserError("posthoc_ema takes a run alone: leave out stages, weights, ties_keep and search.")
    difference = merge_posthoc(Path(config.run), config.posthoc_ema, Path(config.output_dir))
    print(
        f"The average with sigma_rel {config.posthoc_ema:g} is in '{config.output_dir}'. The steps' weights in it "
        f"are {difference:.2%} off: more snapshots come nearer."
    )


def _search_and_merge(config: configs.MergeConfig, stages: Stages | Snapshots) -> None:
    if config.weights:
        raise UserError("Give weights, or search.strategies to search for them, not both.")
    check_optuna()
    from stagepatch.search import best_of, results, search_weights

    output, found = Path(config.output_dir), search_weights(config, stages)
    best = best_of(list(chain(*found.values()))).point
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / "search.lock"):  # processes that shared a search end at the same time
        results.write_merge_results(config, found)
        stages.merge(best, output, config.ties_keep)
    results.print_merge_results(config, found)
    where = output / results.RESULT
    print(f"The best weights of all are {results.format_weights(best)}. Every evaluation is in '{where}'.")


def check_optuna() -> None:
    """Refuse to search without it."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("A search needs Optuna: pip install 'stagepatch[search]'.")
