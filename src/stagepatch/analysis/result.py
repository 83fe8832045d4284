"""What an analysis hands over, and how its numbers are shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from stagepatch.report import Comparison, Table


@dataclass
class Analysis:
    """Numbers, a plot, tables that sum it up, and more of them for the page.

    Args:
        name: of its numbers and of its picture's file.
        numbers: tensors, mappings and lists of them.
        caption: of the plot.
        tensors: what is too large for JSON, by name.
        samples: of two models from the same noise.
    """

    name: str
    title: str
    numbers: dict[str, Any]
    figure: Figure
    caption: str
    summary: Sequence[Table]
    details: Sequence[Table]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    samples: Sequence[Comparison] = ()


def as_plain(value: Any) -> Any:
    """For JSON: lists of numbers, null for NaN."""
    if isinstance(value, Tensor):
        return as_plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: as_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def signed(value: float, digits: int = 3) -> str:
    """A cosine; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.{digits}f}"
