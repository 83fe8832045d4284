"""Train one copy a range of timesteps."""

from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.core import processes, read_json
from stagepatch.methods import STAGE_NAME
from stagepatch.report import print_table
from stagepatch.studies import EXPERTS_NAME, STAGES, cost_table, launch, plan_stages, write_experts
from stagepatch.training import write_run_config


def decouple(config: configs.DecoupleConfig, resolved: str) -> None:
    """Train the stages that are asked for, and write the file of experts that uses each in its range."""
    stages = plan_stages(config)
    directory = Path(config.output_dir)
    if config.stage >= 0:
        stages[config.stage].run()
    else:
        write_run_config(directory, resolved)
        launch(stages, config.launch, directory / "logs", "stages")
    if not processes().is_main_process:
        return
    write_experts(stages, directory / EXPERTS_NAME)
    costs = [read_json(stage.directory / STAGE_NAME) for stage in stages if stage.is_done()]
    if table := cost_table(costs):
        print_table(*table)
    missing = [str(stage.number) for stage in stages if not stage.is_done()]
    more = f" Stages {', '.join(missing)} are still to be trained." if missing else ""
    say(f"The stages are in '{directory / STAGES}', their schedule in '{directory / EXPERTS_NAME}'.{more}")
