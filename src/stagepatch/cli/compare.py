"""Compare methods."""

from __future__ import annotations

from stagepatch.checkpoints import has_vae
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, run_jobs
from stagepatch.core.files import write_text
from stagepatch.data import make_cache
from stagepatch.report import print_table
from stagepatch.studies.compare_job import is_done, run_job
from stagepatch.studies.compare_page import note, short, table, write_results
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.studies.compare_results import collect


def compare(config: configs.CompareConfig, resolved: str) -> None:
    """Train and measure every entry, and write the table."""
    jobs = plan_jobs(config)
    directory = jobs[0].directory.parent.parent
    write_text(directory / RUN_CONFIG, resolved)
    if has_vae(config.model) and not all(map(is_done, jobs)):
        make_cache(jobs[0].cache, config.model, config.data)
    run_jobs(run_job, jobs, is_done, config.launch, directory / "logs")
    rows = collect(jobs, config.metric)
    write_results(directory, jobs, rows, config.metric, resolved)
    print_table(*short(*table(rows, config.metric, jobs[0].extractor + " features")), note(jobs))
    print(f"Report: {directory / 'report.html'}")
