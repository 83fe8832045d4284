"""Tables for the terminal and for Markdown."""

import math
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def format_mean(mean: float, spread: float, digits: int = 2) -> str:
    """'12.30 ± 0.40'; the mean alone where the spread is NaN."""
    if math.isnan(spread):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def format_interval(
    mean: float, interval: tuple[float, float], digits: int = 4, sign: str = "", unit: str = ""
) -> str:
    """'12.30 [11.90, 12.70]'; the mean alone where the interval is NaN. What rounds to zero has no sign of its own.

    Args:
        sign: '+' shows that of positive numbers too.
    """
    shown, *ends = (f"{value:{sign}z.{digits}f}" for value in (mean, *interval))
    return f"{shown}{unit}" if math.isnan(interval[0]) else f"{shown} [{', '.join(ends)}]{unit}"


def format_change(
    mean: float, interval: tuple[float, float], digits: int = 4, scale: float = 1.0, unit: str = ""
) -> str:
    """'+0.12 [-0.10, +0.34]'; '' where the interval is NaN: a difference is not shown without one.

    Args:
        scale: all is multiplied by it.
    """
    ends = scale * interval[0], scale * interval[1]
    return "" if math.isnan(ends[0]) else format_interval(scale * mean, ends, digits, "+", unit)


_NUMBER = re.compile(r"([+\-−]?)((?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?=$|[\s%*×])", re.IGNORECASE)


def as_number(cell: str) -> float | None:
    """The number that a cell begins with: 12.3 of '12.30 ± 0.40', −1.5 of '−1.5 %', 1024 of '1,024'; else None."""
    found = _NUMBER.match(cell.strip())
    return float(("-" if found[1] in ("-", "−") else "") + found[2].replace(",", "")) if found else None


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with a final newline."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table to the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=140, markup=False)
    console.print(table)
