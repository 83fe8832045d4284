"""Run the demo."""

from __future__ import annotations

from pathlib import Path

from stagepatch.cli import config as configs


def demo(config: configs.DemoConfig, resolved: str) -> None:
    """Run the demo."""
    from stagepatch.cli.demo_run import run_demo

    run_demo(Path(config.output_dir), config.quick)
