"""Compare methods."""

from pathlib import Path
from textwrap import indent

from stagepatch.cli import config as configs
from stagepatch.report import print_table
from stagepatch.studies import (
    PLAN_NAME,
    collect,
    launch,
    note,
    plan_jobs,
    short,
    table,
    verdict,
    with_plan,
    write_results,
)
from stagepatch.training import write_run_config


def compare(config: configs.CompareConfig, resolved: str) -> None:
    """Train and measure every entry, and write the table."""
    config = with_plan(config)
    jobs = plan_jobs(config)
    directory = jobs[0].directory.parent.parent
    if config.hours:
        resolved += indent((Path(config.output_dir) / PLAN_NAME).read_text(), f"# {PLAN_NAME}: ")
    write_run_config(directory, resolved)
    launch(jobs, config.launch, directory / "logs")
    rows = collect(jobs, config.metric)
    write_results(directory, jobs, rows, config.metric, resolved)
    print_table(*short(*table(rows, config.metric, jobs[0].extractor + " features")), note(jobs, config.metric))
    print(verdict(rows, config.metric))
    print(f"Report: {directory / 'report.html'}")
