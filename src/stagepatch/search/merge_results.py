"""What a search found, as files and as a table."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stagepatch.core.files import write_atomically, write_json
from stagepatch.report import metric_curves, print_table
from stagepatch.search.engine import Evaluation, best_of

RESULT, PLOT = "search.json", "search.png"


def write_results(found: Mapping[str, Sequence[Evaluation]], metric: str, num_images: int, output: Path) -> None:
    """search.json: all evaluations of each strategy in order; search.png: the best against their number."""
    best = best_of([evaluation for evaluations in found.values() for evaluation in evaluations])
    results = {
        "metric": metric,
        "num_images": num_images,
        "best": _as_json(best),
        "strategies": {strategy: [_as_json(one) for one in evaluations] for strategy, evaluations in found.items()},
    }
    write_json(output / RESULT, results)
    curves = {strategy: _best_so_far(evaluations) for strategy, evaluations in found.items()}
    content = io.BytesIO()
    metric_curves(curves, f"best {metric}", "evaluations").savefig(content, format="png", dpi=130)
    write_atomically(output / PLOT, lambda temporary: _write_bytes(temporary, content.getvalue()))


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Its fields; JSON has no infinite numbers."""
    return asdict(evaluation) | {"value": evaluation.value if math.isfinite(evaluation.value) else None}


def _best_so_far(evaluations: Sequence[Evaluation]) -> list[tuple[int, float]]:
    values = [evaluation.value for evaluation in evaluations]
    return [(number, min(values[:number])) for number in range(1, len(values) + 1)]


def print_results(found: Mapping[str, Sequence[Evaluation]], metric: str, num_images: int) -> None:
    """A row a strategy."""
    columns = ["strategy", "evaluations", "best at", "best weights", metric, "of the base", "seconds"]
    rows = []
    for strategy, evaluations in found.items():
        best = best_of(evaluations)
        base = next(one for one in evaluations if not any(one.weights))
        seconds = sum(one.seconds for one in evaluations)
        counts = [strategy, str(len(evaluations)), str(evaluations.index(best) + 1)]
        values = [written(best.weights), f"{best.value:.4f}", f"{base.value:.4f}", f"{seconds:.0f}"]
        rows.append(counts + values)
    print_table(columns, rows, f"{num_images} images an evaluation, from the same noise")


def written(weights: Sequence[float]) -> str:
    """'0.5, 0.25, 0.1234'."""
    return ", ".join(f"{weight:.4g}" for weight in weights)
