"""What a search found, as files and as a table."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stagepatch.core.files import write_atomically, write_json
from stagepatch.report import metric_curves, print_table
from stagepatch.search.engine import Evaluation, best_of

RESULT, PLOT = "search.json", "search.png"


def write_figure(path: Path, figure: Figure) -> None:
    """A PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def as_json(evaluation: Evaluation, seconds: float, sign: float = 1.0, **named: Any) -> dict[str, Any]:
    """An evaluation, `named` first; JSON has no infinite numbers."""
    value = sign * evaluation.value if math.isfinite(evaluation.value) else None
    return {**named, "value": value, "seconds": seconds} | ({"pruned": True} if evaluation.pruned else {})


def write_merge_results(found: Mapping[str, Sequence[Evaluation]], metric: str, num_images: int, output: Path) -> None:
    """search.json: all evaluations of each strategy in order; search.png: the best against their number."""
    strategies = {
        strategy: [as_json(one, one.seconds, weights=list(one.point)) for one in evaluations]
        for strategy, evaluations in found.items()
    }
    best = best_of(list(itertools.chain(*found.values())))
    results = {"metric": metric, "num_images": num_images, "strategies": strategies}
    write_json(output / RESULT, results | {"best": as_json(best, best.seconds, weights=list(best.point))})
    curves = {}
    for strategy, evaluations in found.items():
        lowest = itertools.accumulate((one.value for one in evaluations), min)
        curves[strategy] = list(enumerate(lowest, start=1))
    write_figure(output / PLOT, metric_curves(curves, f"best {metric}", "evaluations"))


def print_merge_results(found: Mapping[str, Sequence[Evaluation]], metric: str, num_images: int) -> None:
    """A row a strategy."""
    columns = ["strategy", "evaluations", "best at", "best weights", metric, "of the base", "seconds"]
    rows = []
    for strategy, evaluations in found.items():
        best = best_of(evaluations)
        base = next(one for one in evaluations if not any(one.point))
        seconds = sum(one.seconds for one in evaluations)
        counts = [strategy, str(len(evaluations)), str(evaluations.index(best) + 1)]
        values = [format_weights(best.point), f"{best.value:.4f}", f"{base.value:.4f}", f"{seconds:.0f}"]
        rows.append(counts + values)
    print_table(columns, rows, f"{num_images} images an evaluation, from the same noise")


def format_weights(weights: Sequence[float]) -> str:
    """'0.5, 0.25, 0.1234'."""
    return ", ".join(f"{weight:.4g}" for weight in weights)
