"""Merge stages, by the weights of the config or by those that a search finds."""

import importlib.util
from itertools import chain
from pathlib import Path

from stagepatch.checkpoints import build_denoiser, has_vae
from stagepatch.cli import config as configs
from stagepatch.cli.common import bar_over, write_run_config
from stagepatch.core import UserError, alone_in, locked
from stagepatch.data import check_channels, load_training_data
from stagepatch.merging import (
    MergeMethod,
    Snapshots,
    Stages,
    check_lora_method,
    check_weights,
    find_snapshots,
    find_stages,
    merge_posthoc,
    write_fisher,
)


def merge(config: configs.MergeConfig, resolved: str) -> None:
    """Merge stages, a tensor at a time; with a search, first find the weights."""
    output = Path(config.output_dir)
    if config.posthoc_ema:
        _average(config, resolved)
        return
    stages = _find(config)
    if stages.are_loras:
        check_lora_method(config.method)
    elif isinstance(stages, Snapshots):
        stages.check_method(config.method)
    if config.search.strategies:  # which processes may share
        _search_and_merge(config, stages)
        write_run_config(output, resolved)
    else:
        with alone_in(output):
            _merge(config, stages)
            write_run_config(output, resolved)
    if isinstance(stages, Snapshots) and stages.model:
        print(f"The merged result of the run is in '{output}'.")
    else:
        print(f"The merged {'LoRA' if stages.are_loras else 'model'} is in '{output}'.")


def _merge(config: configs.MergeConfig, stages: Stages | Snapshots) -> None:
    output = Path(config.output_dir)
    if isinstance(stages, Snapshots):
        stages.merge(config.weights, output, config.method)
    else:
        fishers = _write_fishers(config, stages) if config.method.kind == "fisher" else []
        stages.merge(config.weights, output, config.method, fishers)


def _write_fishers(config: configs.MergeConfig, stages: Stages | Snapshots) -> list[Path]:
    """Of each stage in turn, in 'fisher/'; those that are there already are taken."""
    check_weights(stages.directories, config.weights, config.method)
    dataset = load_training_data(stages.base, config.data, config.cache, config.output_dir)
    if not has_vae(stages.base):
        check_channels(dataset, int(build_denoiser(stages.base).config["in_channels"]), config.data)
    paths = [Path(config.output_dir) / "fisher" / f"{number}.safetensors" for number in range(len(config.weights))]
    with bar_over(config.fisher_samples * len(paths), "Fishers") as on_sample:
        for path, stage in zip(paths, stages.directories, strict=True):
            write_fisher(path, stage, dataset, config.data, config.fisher_samples, config.seed, on_sample)
    return paths


def _find(config: configs.MergeConfig) -> Stages | Snapshots:
    if not config.run:
        return find_stages(config.base, config.stages, needs_base=bool(config.search.strategies))
    if config.stages:
        raise UserError("Give stages, or a run whose snapshots are the stages, not both.")
    return find_snapshots(config.run, config.base)


def _average(config: configs.MergeConfig, resolved: str) -> None:
    if not config.run:
        raise UserError(f"posthoc_ema={config.posthoc_ema} is of a training's averages: give run, its directory.")
    if config.weights or config.stages or config.search.strategies or config.method != MergeMethod():
        raise UserError("posthoc_ema takes a run alone: leave out stages, weights, search and merge_method's options.")
    output = Path(config.output_dir)
    with alone_in(output):
        difference = merge_posthoc(Path(config.run), config.posthoc_ema, output)
        write_run_config(output, resolved)
    way_out = ": more snapshots come nearer" if difference > 0.001 else ""
    print(
        f"The average with sigma_rel {config.posthoc_ema:g} is in '{config.output_dir}'. The steps' weights in it "
        f"are {difference:.2%} off{way_out}."
    )


def _search_and_merge(config: configs.MergeConfig, stages: Stages | Snapshots) -> None:
    if config.weights:
        raise UserError("Give weights, or search.strategies to search for them, not both.")
    check_optuna()
    from stagepatch.search import best_of, results, search_weights

    output, found = Path(config.output_dir), search_weights(config, stages)
    best = best_of(list(chain(*found.values()))).point
    with locked(output / "search.lock"):  # processes that shared a search end at the same time
        results.write_merge_results(config, found)
        stages.merge(best, output, config.method)
    results.print_merge_results(config, found)
    where = output / results.RESULT
    print(f"The best weights of all are {results.format_weights(best)}. Every evaluation is in '{where}'.")


def check_optuna() -> None:
    """Refuse to search without it."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("A search needs Optuna: pip install 'stagepatch[search]'.")
