"""From a config to LoRA experts, each a stage of decoupling, and the training of a router that mixes them."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from stagepatch.checkpoints import build_denoiser, load_denoiser
from stagepatch.core import STAGE, as_json, processes, seed_for, write_json, write_text
from stagepatch.data import cache_directory
from stagepatch.merging import assemble_loras
from stagepatch.methods import LoRA
from stagepatch.studies.assemble_config import AssembleConfig
from stagepatch.studies.decouple_config import DecoupleConfig, StageTrainingConfig
from stagepatch.studies.decouple_jobs import EXPERTS_NAME, Stage, plan_stages, write_experts
from stagepatch.studies.job import Job
from stagepatch.training import BOOKKEEPING, Run, TrainConfig

SCALES, START = "scales", "start"
_ELSEWHERE = ("output_dir", "cache", "cache_batch_size", "ddo", "start_from")


@dataclass
class Assembly(Job):
    """The router's training, in the directory of the result.

    Args:
        config: its `start_from` takes the experts side by side, written when they are done.
        experts: their directories, finest scale first.
        config_text: kept as run.yaml.
    """

    config: TrainConfig
    experts: list[Path]
    config_text: str = ""
    record = "assembly.json"
    noun = "router"

    @property
    def directory(self) -> Path:  # type: ignore[override]
        """The result's."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return "the router"

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.config).items() if name not in _ELSEWHERE}

    def is_done(self) -> bool:
        return (self.directory / self.record).exists()

    def work(self) -> None:
        start = Path(self.config.start_from)
        is_main = processes().is_main_process
        if is_main and not LoRA.is_saved_in(start):
            assemble_loras(self.experts, self.config.lora, load_denoiser(self.config.model)[0], start)
        processes().wait_for_everyone()
        Run(self.config, identity=self.identity(), config_text=self.config_text).train(progress=False)
        if is_main:
            write_json(self.directory / self.record, as_json(self.identity()))


def plan_assembly(config: AssembleConfig, config_text: str = "") -> tuple[list[list[Stage]], Assembly]:
    """The experts of each scale, finest first, and the router.

    Raises:
        UserError: scales that cannot be, or a directory that holds other experts or another router.
    """
    LoRA(config.lora).prepare(build_denoiser(config.model))
    scales = [plan_stages(_fostering(config, count)) for count in config.lora.scales]
    output = Path(config.output_dir)
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    values |= {"training": config.router_training, "start_from": str(output / START)}
    values["cache"] = str(cache_directory(config.cache, config.output_dir))
    experts = [stage.directory for scale in scales for stage in scale]
    assembly = Assembly(TrainConfig(**values), experts, config_text)
    assembly.check_directory(TrainConfig(), BOOKKEEPING)
    return scales, assembly


def _fostering(config: AssembleConfig, count: int) -> DecoupleConfig:
    """Of a scale: LoRAs, each on its range alone, by the denoising loss alone."""
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    training = StageTrainingConfig(**asdict(config.training))
    training.seed = seed_for(STAGE, training.seed, count)
    lora = replace(config.lora, stage_gate="gaussian", scales=[], gate_learning_rate_factor=1.0)
    values |= {"output_dir": str(Path(config.output_dir) / SCALES / str(count)), "training": training, "lora": lora}
    values["cache"] = str(cache_directory(config.cache, config.output_dir))
    return DecoupleConfig(**values, num_stages=count, p=0.0, consistency=0.0, launch=config.launch)


def write_schedules(scales: list[list[Stage]], assembly: Assembly) -> None:
    """Files of experts: each scale's experts in their ranges, and the assembled LoRA at all timesteps."""
    for stages in scales:
        write_experts(stages, stages[0].directory.parent.parent / EXPERTS_NAME)
    whole = {"from": 0, "to": scales[0][-1].stop, "learned": "."}
    write_text(assembly.directory / EXPERTS_NAME, yaml.safe_dump({"experts": [whole]}, sort_keys=False))
