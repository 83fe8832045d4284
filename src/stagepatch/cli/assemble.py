"""Train LoRA experts by range of timesteps, and a router that mixes them."""

from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.studies import launch, plan_assembly, write_schedules


def assemble(config: configs.AssembleConfig, resolved: str) -> None:
    """Train the experts of every scale, then the router."""
    scales, assembly = plan_assembly(config, resolved)
    logs = Path(config.output_dir) / "logs"
    launch([stage for scale in scales for stage in scale], config.launch, logs, "experts")
    launch([assembly], config.launch, logs, "router")
    write_schedules(scales, assembly)
    say(f"The LoRA is in '{config.output_dir}': give it as patch, or its experts.yaml as schedule.")
