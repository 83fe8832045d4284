"""What a comparison says, in words."""

import math
from collections.abc import Sequence

from stagepatch.evaluation import METRICS, Difference
from stagepatch.report import format_interval
from stagepatch.studies.compare_results import SIGNIFICANCE, Row

_KINDS = {"steps": "equal steps", "parameters": "equal parameters", "free": "no training"}


def verdict(rows: Sequence[Row], metric: str) -> str:
    """Whether any method gains over the base, and beats every control, and whether recall falls."""
    base = next((row for row in rows if row.is_base), None)
    methods = [row for row in rows if row.is_method and row.differences]
    if base is None or not methods:
        return "No verdict: it takes an untrained base and at least one method."
    sign, scale = METRICS[metric].sign, 100.0 / abs(base.curve[0][0] or 1.0)
    methods.sort(key=lambda row: sign * row.differences[row.last].mean)
    gaining = [row for row in methods if _is_better(row.differences[row.last], row.holm, sign)]
    best = (gaining or methods)[0]
    change = _percent(best.differences[best.last], scale)
    caveat = "" if best.runs > 1 else "All is of one training run: of another, the tests say nothing."
    if not gaining:
        none = f"No method gains over the base beyond noise: the best, {best.name}, changes {metric} by {change}."
        return f"{none} {caveat}".strip()
    count = f"corrected for {len(methods)} methods" if len(methods) > 1 else "of one method"
    unit = f"{best.runs} training runs" if best.runs > 1 else "sampling seeds"
    said = [f"{best.name} gains: {metric} changes by {change} (p = {best.holm:.2g} over {unit}, {count})."]
    if gaining[1:]:
        said.append(f"So do {', '.join(f'{row.name} ({_short(row, scale)})' for row in gaining[1:])}.")
    said += [_against(best, rows, sign, scale), _others(gaining[1:], sign), _second(best, base, metric)]
    said += [_recall(best), caveat]
    return " ".join(sentence for sentence in said if sentence)


def _against(best: Row, rows: Sequence[Row], sign: float, scale: float) -> str:
    if not best.against:
        return "There is no control in this comparison that could explain it away."
    kinds = {row.name: _KINDS.get(row.control, row.control) for row in rows}
    stronger = [name for name in best.against if not _beats(best, name, sign)]
    if stronger:
        named = ", ".join(f"{name} ({kinds[name]}: {_percent(best.against[name], scale)})" for name in stronger)
        return f"{best.name} does not beat, beyond noise, {named}."
    name, nearest = max(best.against.items(), key=lambda pair: sign * pair[1].mean)
    count = f"all {len(best.against)} controls" if len(best.against) > 1 else "the control"
    return f"{best.name} beats {count}; to the nearest, {name} ({kinds[name]}), it is {_percent(nearest, scale)}."


def _others(gaining: Sequence[Row], sign: float) -> str:
    """Those, after the best, that beat every control too."""
    names = [row.name for row in gaining if row.against and all(_beats(row, name, sign) for name in row.against)]
    return f"Every control is beaten by {', '.join(names)} too." if names else ""


def _second(best: Row, base: Row, metric: str) -> str:
    change = best.changes.get("fid_second")
    if change is None or metric == "fid_second":
        return ""
    scale = 100.0 / abs(base.metrics["fid_second"] or 1.0)
    return f"In the second features FID changes by {_percent(change, scale)}."


def _recall(best: Row) -> str:
    change = best.changes.get("recall")
    if change is None:
        return ""
    if change.mean < 0 and change.p_value < SIGNIFICANCE:
        return f"Recall changes by {_recall_change(change)}: it gives up coverage."
    return f"Recall does not fall beyond noise ({_recall_change(change)})."


def _recall_change(change: Difference) -> str:
    return format_interval(change.mean, change.interval, 3, "+")


def _beats(row: Row, control: str, sign: float) -> bool:
    change = row.against[control]
    return _is_better(change, change.p_value, sign)


def _is_better(change: Difference, p_value: float, sign: float) -> bool:
    return sign * change.mean < 0 and p_value < SIGNIFICANCE


def _short(row: Row, scale: float) -> str:
    return f"{scale * row.differences[row.last].mean:+.1f} %"


def _percent(change: Difference, scale: float) -> str:
    low, high = change.interval
    interval = "" if math.isnan(low) else f" (95% interval {scale * low:+.1f} to {scale * high:+.1f} %)"
    return f"{scale * change.mean:+.1f} %{interval}"
