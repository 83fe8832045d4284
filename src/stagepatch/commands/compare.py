"""Compare methods."""

from __future__ import annotations

import torch

from stagepatch import config as configs
from stagepatch.backbones import has_vae
from stagepatch.commands.common import RUN_CONFIG
from stagepatch.comparing.job import is_done, run_job
from stagepatch.comparing.page import note, short, table, write_results
from stagepatch.comparing.plan import Job, plan_jobs
from stagepatch.comparing.results import collect
from stagepatch.data import make_cache
from stagepatch.files import write_text
from stagepatch.launching import launch
from stagepatch.progress import progress_bar
from stagepatch.report import print_table


def compare(config: configs.CompareConfig, resolved: str) -> None:
    """Train and measure every entry, and write the table."""
    jobs = plan_jobs(config)
    directory = jobs[0].directory.parent.parent
    write_text(directory / RUN_CONFIG, resolved)
    left = [job for job in jobs if not is_done(job)]
    if left and has_vae(config.model):
        make_cache(jobs[0].cache, config.model, config.data, 8, torch.float32)
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} of them done; logs in '{directory / 'logs'}'.")
    with progress_bar() as progress:
        task = progress.add_task("jobs", total=len(jobs), completed=len(jobs) - len(left), status="")

        def on_done(job: Job) -> None:
            progress.advance(task)
            progress.console.print(f"done: {job}", highlight=False)

        launch(run_job, left, config.launch, directory / "logs", on_done)
    rows = collect(jobs, config.metric)
    write_results(directory, jobs, rows, config.metric, resolved)
    print_table(*short(*table(rows, config.metric, jobs[0].extractor + " features")), note(jobs))
    print(f"Report: {directory / 'report.html'}")
