"""Merge stages, by given weights or by those that a search finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from stagepatch.checkpoints.loading import find_model
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG
from stagepatch.core.errors import UserError
from stagepatch.core.files import write_text
from stagepatch.merging import Stages, Ties, find_stages, merge_lora_stages, merge_models

if TYPE_CHECKING:
    from rich.progress import TaskID

    from stagepatch.search.engine import Evaluation


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
        _merge(config, stages, config.weights)
    write_text(output / RUN_CONFIG, resolved)
    print(f"The merged {'LoRA' if stages.are_loras else 'model'} is in '{output}'.")


def _merge(config: configs.MergeConfig, stages: Stages, weights: Sequence[float]) -> None:
    output = Path(config.output_dir)
    if stages.are_loras:
        merge_lora_stages(stages.directories, weights, output)
    else:
        ties = Ties(config.ties_keep) if config.ties_keep else None
        merge_models(find_model(stages.base), stages.directories, weights, output, ties)


def _search_and_merge(config: configs.MergeConfig, stages: Stages) -> None:
    if config.weights:
        raise UserError("Give weights, or search.strategies to search for them, not both.")
    if importlib.util.find_spec("optuna") is None:
        raise UserError("A search for weights needs Optuna: pip install 'stagepatch[search]'.")
    from stagepatch.search.engine import best_of
    from stagepatch.search.merge_results import RESULT, print_results, write_results, written

    output = Path(config.output_dir)
    found = _search(config, stages)
    best = best_of([evaluation for evaluations in found.values() for evaluation in evaluations])
    metric, num_images = config.search.metric, config.sampling.num_images
    with FileLock(output / "search.lock"):  # processes that shared a search end at the same time
        write_results(found, metric, num_images, output)
        _merge(config, stages, best.weights)
    print_results(found, metric, num_images)
    print(f"The best weights of all are {written(best.weights)}. Every evaluation is in '{output / RESULT}'.")


def _search(config: configs.MergeConfig, stages: Stages) -> dict[str, list[Evaluation]]:
    from stagepatch.core.processes import processes
    from stagepatch.core.progress import progress_bar
    from stagepatch.search.engine import best_of, check_search, search_weights
    from stagepatch.search.merge_objective import make_objective, objective_identity

    if processes().num_processes > 1:
        raise UserError(
            "A search is not shared under `accelerate launch`: start `stagepatch merge` several times instead, each "
            "on its own device; they share the evaluations through search.storage."
        )
    count, output = len(stages.directories), Path(config.output_dir)
    check_search(config.search, count)
    objective = make_objective(config, stages)
    output.mkdir(parents=True, exist_ok=True)
    storage = config.search.storage or str(output / "search.journal")
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(strategy: str, done: list[Evaluation], total: int) -> None:
            if strategy not in tasks:
                tasks[strategy] = progress.add_task(strategy, status="")
            best = f"best {best_of(done).value:.4g}" if done else ""
            progress.update(tasks[strategy], completed=len(done), total=total, status=best)

        identity = objective_identity(config, stages)
        return search_weights(objective, count, config.search, storage, identity, on_progress)
