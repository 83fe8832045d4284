"""Merge stages, by the weights of the config or by those that a search finds."""

import importlib.util
from itertools import chain
from pathlib import Path

from filelock import FileLock

from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG
from stagepatch.core import UserError, write_text
from stagepatch.merging import Stages, find_stages


def merge(config: configs.MergeConfig, resolved: str) -> None:
    """Merge stages, a tensor at a time; with a search, first find the weights."""
    output = Path(config.output_dir)
    if not 0.0 <= config.ties_keep <= 1.0:
        raise UserError(f"ties_keep={config.ties_keep} must be a share from 0 to 1.")
    stages = find_stages(config.base, config.stages, needs_base=bool(config.search.strategies))
    if stages.are_loras and config.ties_keep:
        raise UserError("TIES-merging of LoRAs would not be a LoRA: set ties_keep to 0.")
    if config.search.strategies:
        _search_and_merge(config, stages)
    else:
        stages.merge(config.weights, output, config.ties_keep)
    write_text(output / RUN_CONFIG, resolved)
    print(f"The merged {'LoRA' if stages.are_loras else 'model'} is in '{output}'.")


def _search_and_merge(config: configs.MergeConfig, stages: Stages) -> None:
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
