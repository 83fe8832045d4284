"""What decoupling takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stagepatch.core.errors import UserError
from stagepatch.data.config import DataConfig
from stagepatch.diffusion.config import WeightingConfig
from stagepatch.methods.config import LoRAConfig
from stagepatch.patch.config import PatchConfig
from stagepatch.studies.launch_config import LaunchConfig
from stagepatch.training.config import TrainingConfig

_RELEASED: dict[str, Any] = {
    "adam_beta1": 0.95,
    "weight_decay": 1e-6,
    "max_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "ema_power": 0.75,
}


@dataclass
class DecoupleConfig:
    """Train one copy of a model for each range of timesteps (DeMe, arXiv 2410.06664).

    The same command again goes on with what is unfinished and skips what is done. `stagepatch merge` makes one model
    of the copies; `stagepatch sample --schedule OUTPUT_DIR/experts.yaml` uses each in its range.

    Args:
        output_dir: takes a directory a stage under 'stages', and experts.yaml.
        model: a model directory, a Hub id, or 'digits'.
        preset: 'paper', as the supplement says; 'released', what the authors' code has besides: antithetic timesteps,
            and for fields of `training` that keep their default: AdamW betas .95/.999, weight decay 1e-6, clipping
            at 1, an average with power 3/4 up to .9999.
        num_stages: ranges N (DeMe: 4).
        split: ranges equal in timesteps ('t', DeMe), or in log-SNR.
        boundaries: first timesteps of the second and later ranges, in place of num_stages and split.
        p: probability of a timestep from all of T instead of the range (DeMe: 0.3; CIFAR-10: 0.4).
        consistency: weight of the squared distance to the original's prediction (DeMe: 1).
        projection: a C×C map after each stage of a U-Net, or on the input of each block, the identity at first, that
            trains with all weights (DeMe). It is folded into the model's own weights where that is exact; where it is
            not, it is kept in the model's file, and diffusers alone would leave it out. Only for method 'finetune'.
        antithetic: mirror half of a batch's timesteps; null is as the preset says.
        method: what each copy trains: 'finetune', all weights (DeMe), and then a stage is a whole model; or 'lora',
            'bitfit', 'dmp', 'prompt_tuning', and then a stage is a small file.
        stage: number of the one stage to train, in this process; -1 trains all, as jobs.
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        patch: what a patch learns.
        lora: what a LoRA learns.
        weighting: of timesteps in the loss.
        data: training images: the ones that the model was trained on.
        training: of each stage (DeMe: 20,000 steps; LSUN: batch 16 × 4, rate 5e-5; CIFAR-10: batch 64, rate 2e-4);
            each draws images, noise and timesteps of its own, from `training.seed` and its number.
        launch: where jobs run.
    """

    output_dir: str = "runs/decouple"
    model: str = "digits"
    preset: Literal["paper", "released"] = "paper"
    num_stages: int = 4
    split: Literal["t", "log_snr"] = "t"
    boundaries: list[int] = field(default_factory=list)
    p: float = 0.3
    consistency: float = 1.0
    projection: bool | None = None
    antithetic: bool | None = None
    method: Literal["finetune", "lora", "bitfit", "dmp", "prompt_tuning"] = "finetune"
    stage: int = -1
    cache: str = ""
    patch: PatchConfig = field(default_factory=PatchConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=20_000, batch_size=64, learning_rate=5e-5)
    )
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        if self.preset not in ("paper", "released"):
            raise UserError(f"preset='{self.preset}' is none of paper, released.")
        if self.antithetic is None:
            self.antithetic = self.preset == "released"
        if self.projection is None:
            self.projection = self.method == "finetune"
        if self.projection and self.method != "finetune":
            raise UserError(
                f"projection trains with all weights: set it to false, or method='{self.method}' to finetune."
            )
        if self.consistency < 0.0:
            raise UserError(f"consistency={self.consistency} must not be negative.")
        if self.preset == "released":
            untouched = TrainingConfig()
            changes = {k: v for k, v in _RELEASED.items() if getattr(self.training, k) == getattr(untouched, k)}
            self.training = replace(self.training, **changes)
