"""What a comparison says, in words."""

import math
from collections.abc import Sequence

from stagepatch.evaluation import METRICS
from stagepatch.studies.compare_results import SIGNIFICANCE, Difference, Row


def verdict(rows: Sequence[Row], metric: str) -> str:
    """Whether any method gains over the base, and beats every control, and whether recall falls."""
    base = next((row for row in rows if row.is_base), None)
    methods = [row for row in rows if row.is_method and row.differences]
    if base is None or not methods:
        return "No verdict: it takes an untrained base and at least one method."
    sign, scale = METRICS[metric].sign, 100.0 / abs(base.curve[0][0] or 1.0)
    best = min(methods, key=lambda row: sign * row.differences[row.last].mean)
    change = best.differences[best.last]
    if not _is_better(change, best.holm, sign):
        return f"No method gains over the base: the best, {best.name}, changes {metric} by {_percent(change, scale)}."
    count = f"corrected for {len(methods)} methods" if len(methods) > 1 else "of one method"
    said = [f"{best.name} gains: {metric} changes by {_percent(change, scale)} (p = {best.holm:.2g}, {count})."]
    said += [_against(best, rows, sign, scale), _recall(best)]
    return " ".join(sentence for sentence in said if sentence)


def _against(best: Row, rows: Sequence[Row], sign: float, scale: float) -> str:
    if not best.against:
        return "There is no control in this comparison that could explain it away."
    by_name = {row.name: row for row in rows}
    name, nearest = max(best.against.items(), key=lambda pair: sign * pair[1].mean)
    kind = by_name[name].control
    if _is_better(nearest, nearest.p_value, sign):
        margin = f"{abs(scale * nearest.mean):.1f} points"
        return f"It beats all {len(best.against)} controls, the nearest of them ({name}, {kind}) by {margin}."
    stronger = [other for other, own in best.against.items() if not _is_better(own, own.p_value, sign)]
    return f"It does not beat, beyond noise, {', '.join(f'{other} ({by_name[other].control})' for other in stronger)}."


def _recall(best: Row) -> str:
    change = best.changes.get("recall")
    if change is None:
        return ""
    if change.mean < 0 and change.p_value < SIGNIFICANCE:
        return f"Recall falls by {-change.mean:.3f} ± {change.error:.3f}: it gives up coverage."
    return f"Recall does not fall ({change.mean:+.3f} ± {_or_nothing(change.error)})."


def _is_better(change: Difference, p_value: float, sign: float) -> bool:
    return sign * change.mean < 0 and p_value < SIGNIFICANCE


def _percent(change: Difference, scale: float) -> str:
    low, high = change.interval
    interval = "" if math.isnan(low) else f" (95% interval {scale * low:+.1f} to {scale * high:+.1f} %)"
    return f"{scale * change.mean:+.1f} %{interval}"


def _or_nothing(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.3f}"
