"""Say what a path holds."""

from __future__ import annotations

from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.inspection import describe_path
from stagepatch.report import print_table


def inspect(config: configs.InspectConfig, resolved: str) -> None:
    """Say what a path holds."""
    print_table(["what", "value"], describe_path(Path(config.path)), str(config.path))
