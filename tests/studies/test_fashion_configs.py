"""The bench's tables: each is planned on the bundled model, but for rows of what other commands make first."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stagepatch.cli.app import _parse
from stagepatch.studies.compare_plan import plan_jobs

FASHION = Path(__file__).parent.parent.parent / "configs" / "fashion"
TABLES = [path for path in sorted(FASHION.glob("*.yaml")) if "\nentries:" in path.read_text()]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_of_the_bench_are_planned(path, tmp_path):
    config, _ = _parse("compare", [f"--config={path}", "--model=fashion", f"--output_dir={tmp_path}"])
    entries = [entry for entry in config.entries if "runs/" not in str(asdict(entry))]
    named = {entry.name for entry in entries}
    entries = [entry for entry in entries if not entry.after or entry.after in named]
    jobs = plan_jobs(replace(config, entries=entries))
    assert [*dict.fromkeys(job.name for job in jobs)] == [entry.name for entry in entries]
    assert jobs[0].is_base
