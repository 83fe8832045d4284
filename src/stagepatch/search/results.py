"""What a search found, as files and as a table."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stagepatch.core import write_json
from stagepatch.report import metric_curves, print_table, write_picture
from stagepatch.search.config import MergeConfig
from stagepatch.search.engine import Evaluation, best_of

RESULT, PLOT = "search.json", "search.png"


def evaluation_json(evaluation: Evaluation, seconds: float, sign: float = 1.0, **named: Any) -> dict[str, Any]:
    """An evaluation, `named` first; JSON has no infinite numbers."""
    value = sign * evaluation.value if math.isfinite(evaluation.value) else None
    return {**named, "value": value, "seconds": seconds} | ({"pruned": True} if evaluation.pruned else {})


def write_merge_results(config: MergeConfig, found: Mapping[str, Sequence[Evaluation]]) -> None:
    """search.json: all evaluations of each strategy in order; search.png: the best against their number."""

    def as_json(one: Evaluation) -> dict[str, Any]:
        return evaluation_json(one, one.seconds, weights=list(one.point))

    output, metric, curves = Path(config.output_dir), config.search.metric, {}
    for strategy, evaluations in found.items():
        lowest = itertools.accumulate((one.value for one in evaluations), min)
        curves[strategy] = list(enumerate(lowest, start=1))
    results = {
        "metric": metric,
        "num_images": config.sampling.num_images,
        "strategies": {strategy: list(map(as_json, evaluations)) for strategy, evaluations in found.items()},
        "best": as_json(best_of(list(itertools.chain(*found.values())))),
    }
    write_json(output / RESULT, results)
    write_picture(output / PLOT, metric_curves(curves, f"best {metric}", "evaluations"))


def print_merge_results(config: MergeConfig, found: Mapping[str, Sequence[Evaluation]]) -> None:
    """A row a strategy."""
    columns = ["strategy", "evaluations", "best at", "best weights", config.search.metric, "of the base", "seconds"]
    rows = []
    for strategy, evaluations in found.items():
        best = best_of(evaluations)
        base = next(one for one in evaluations if not any(one.point))
        seconds = sum(one.seconds for one in evaluations)
        counts = [strategy, str(len(evaluations)), str(evaluations.index(best) + 1)]
        rows.append([*counts, format_weights(best.point), f"{best.value:.4f}", f"{base.value:.4f}", f"{seconds:.0f}"])
    print_table(columns, rows, f"{config.sampling.num_images} images an evaluation, from the same noise")


def format_weights(weights: Sequence[float]) -> str:
    """'0.5, 0.25, 0.1234'."""
    return ", ".join(f"{weight:.4g}" for weight in weights)
