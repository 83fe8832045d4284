"""What assembling takes."""

from dataclasses import dataclass, field, replace
from typing import Any

from stagepatch.core import UserError, check_values
from stagepatch.diffusion import TimestepsConfig
from stagepatch.methods import ROUTERS, LoRAConfig
from stagepatch.studies.launch_jobs import LaunchConfig
from stagepatch.training import TrainConfig, TrainingConfig


@dataclass
class AssembleConfig(TrainConfig):
    """Train LoRA experts for ranges of timesteps, and a router that mixes them (TimeStep Master, arXiv 2503.07416).

    The same command again goes on with what is unfinished and skips what is done. The result is a LoRA, for `sample`,
    `evaluate` and pipelines; experts.yaml in output_dir is the same for `compare`, and scales/N/experts.yaml are the N
    experts of a scale alone, each in its range.

    Args:
        output_dir: takes the result, and the experts under 'scales'.
        method: 'lora' alone can be assembled.
        lora: rank and targets of each expert; `scales`, the number of experts at each, finest first; `stage_gate`, the
            kind of router: 'router', or 'time_router', which does not read the layers' inputs and can be merged.
        start_from: directory of a LoRA that each expert trains on from; empty to start from the model.
        timesteps: those of each expert follow from the scales.
        training: of each expert; each draws images, noise and timesteps of its own.
        assembling: fields of `training` that differ for the router, which trains on all timesteps.
        launch: where jobs run.
    """

    output_dir: str = "runs/assemble"
    method: str = "lora"
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(stage_gate="router", scales=[8, 4, 2, 1]))
    assembling: dict[str, Any] = field(default_factory=dict)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "lora":
            raise UserError(f"A router mixes LoRAs: set method='{self.method}' to lora.")
        if self.lora.stage_gate not in ROUTERS:
            raise UserError(
                f"lora stage_gate='{self.lora.stage_gate}' is no router: take one of {', '.join(ROUTERS)}."
            )
        if self.timesteps != TimestepsConfig():
            raise UserError("timesteps are those of each expert: say with lora.scales which.")
        if self.objective != "denoising":
            raise UserError(f"Experts and router learn by the denoising loss: leave out objective='{self.objective}'.")
        check_values(self.assembling, TrainingConfig, "assembling")

    @property
    def router_training(self) -> TrainingConfig:
        """Training of the router."""
        return replace(self.training, **self.assembling)
