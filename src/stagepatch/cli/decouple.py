"""Train one copy a range of timesteps."""

from __future__ import annotations

from pathlib import Path

import yaml

from stagepatch.checkpoints import has_vae
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, run_jobs, say
from stagepatch.core.files import write_text
from stagepatch.core.processes import processes
from stagepatch.data import make_cache
from stagepatch.studies import Stage, is_done, plan_stages, run_stage

EXPERTS_NAME = "experts.yaml"


def decouple(config: configs.DecoupleConfig, resolved: str) -> None:
    """Train the stages that are asked for, and write the schedule that uses each in its range."""
    stages = plan_stages(config)
    directory = Path(config.output_dir)
    if config.stage < 0:
        write_text(directory / RUN_CONFIG, resolved)
    if has_vae(config.model) and not all(map(is_done, stages)):
        make_cache(stages[0].cache, config.model, config.data)
    if config.stage >= 0:
        run_stage(stages[config.stage])
    else:
        run_jobs(run_stage, stages, is_done, config.launch, directory / "logs", "stages")
    if not processes().is_main_process:
        return
    write_text(directory / EXPERTS_NAME, _experts(stages))
    missing = [str(stage.number) for stage in stages if not is_done(stage)]
    more = f" Stages {', '.join(missing)} are still to be trained." if missing else ""
    say(f"The stages are in '{directory / 'stages'}', their schedule in '{directory / EXPERTS_NAME}'.{more}")


def _experts(stages: list[Stage]) -> str:
    """The schedule as YAML, its paths relative to its own directory."""
    kind = "model" if stages[0].config.method == "finetune" else "learned"
    experts = [
        {"from": stage.first, "to": stage.stop, kind: f"{stage.directory.parent.name}/{stage.number}"}
        for stage in stages
    ]
    return yaml.safe_dump({"experts": experts}, sort_keys=False)
