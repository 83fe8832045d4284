"""What decoupling takes."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stagepatch.core import UserError, check_numbers
from stagepatch.diffusion import TimestepsConfig
from stagepatch.studies.launch_jobs import LaunchConfig
from stagepatch.training import TrainConfig, TrainingConfig

_OF_PAPER = {"p": 0.3, "consistency": 1.0, "antithetic": False}
_TRAINING_OF_PAPER = {"steps": 20_000, "batch_size": 64, "learning_rate": 5e-5}
_OPTIMIZER_OF_CODE = {"adam_beta1": 0.95, "weight_decay": 1e-6, "max_grad_norm": 1.0}
# Of a preset: the config's own fields, and its training's.
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": (_OF_PAPER, _TRAINING_OF_PAPER),
    "released": (
        _OF_PAPER | {"antithetic": True},
        _TRAINING_OF_PAPER | _OPTIMIZER_OF_CODE | {"ema_decay": 0.9999, "ema_power": 0.75},
    ),
    "experts": (
        {"p": 0.0, "consistency": 0.0, "antithetic": False, "projection": False},
        _TRAINING_OF_PAPER | {"steps": 2000, "batch_size": 128, "lr_scheduler": "linear", "ema_decay": 0.998},
    ),
}


@dataclass
class StageTrainingConfig(TrainingConfig):
    """Of each stage (DeMe: 20,000 steps; LSUN: batch 16 × 4, rate 5e-5; CIFAR-10: batch 64, rate 2e-4).

    What is null is as the preset says, and where that says nothing as in TrainingConfig.
    """

    steps: int | None = None  # type: ignore[assignment]
    batch_size: int | None = None  # type: ignore[assignment]
    learning_rate: float | None = None  # type: ignore[assignment]
    lr_scheduler: Literal["constant", "linear", "cosine"] | None = None  # type: ignore[assignment]
    adam_beta1: float | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    max_grad_norm: float | None = None  # type: ignore[assignment]
    ema_decay: float | None = None  # type: ignore[assignment]
    ema_power: float | None = None  # type: ignore[assignment]

    def resolve(self, preset: str) -> TrainingConfig:
        """With what was left out filled in."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return TrainingConfig(**_PRESETS[preset][1] | values)


@dataclass
class DecoupleConfig(TrainConfig):
    """Train one copy of a model for each range of timesteps (DeMe, arXiv 2410.06664).

    The same command again goes on with what is unfinished and skips what is done. `stagepatch merge` makes one model
    of the copies; `stagepatch sample --schedule OUTPUT_DIR/experts.yaml` uses each in its range.

    Args:
        output_dir: takes a directory a stage under 'stages', and experts.yaml.
        method: what each copy trains: 'finetune', all weights (DeMe), and then a stage is a whole model; or 'lora',
            'bitfit', 'dmp', 'prompt_tuning', 'wavelet', and then a stage is a small file.
        preset: where p, consistency, projection, antithetic and fields of `training` come from that are left out.
            'paper', as the supplement says; 'released', what the authors' code has besides: antithetic timesteps,
            AdamW betas .95/.999, weight decay 1e-6, clipping at 1, an average with power 3/4 up to .9999; 'experts',
            copies that are used by range and not merged, what won on the bench of docs/evidence.md: each on its range
            alone (p, consistency 0, no projection), 2000 steps of 128, the rate falling to zero, averaged.
        num_stages: ranges N (DeMe: 4).
        split: ranges equal in timesteps as the model is told them ('t', DeMe), or in log-SNR; or 'gradient', clusters
            of timesteps whose gradients are alike, by `balancing.similarity` (docs/balancing.md).
        boundaries: first timesteps of the second and later ranges, in place of num_stages and split.
        tree: levels of a binary tree of ranges (eDiff-I, arXiv 2211.01324, Section 4.1), at the image's end and at the
            noise's, in place of num_stages: [3, 9] is an expert for the lowest of 2³ ranges, one for the highest of
            2⁹ and one for all between. Each end is trained level by level, from 2¹ on, each from the one before; level
            0 grows none there. Empty: every stage starts from the model.
        models: a model for each range, in place of copies of `model`, which stays what samples start from: of other
            widths, depths or kinds (MEME, arXiv 2306.04990). Each must take and give what `model` does. Only for
            method 'finetune'; the stages are experts, and are not merged.
        prune: share of the heads, and of the MLPs' hidden channels, that a DiT's copy loses before it is trained
            (Diff-Pruning, arXiv 2305.10924), or a list of one for each range. What goes is of least importance in the
            range, by gradients. Only for method 'finetune'; needs `pip install 'stagepatch[pruning]'`.
        prune_budget: share of the model's FLOPs, in the mean over timesteps, that DiTs pruned for the ranges may take,
            in place of `prune` (DiffPruning, arXiv 2409.15557): which blocks, heads and hidden channels stay in which
            range is learned before the stages are trained. 0: none.
        prune_steps: of that learning, on the frozen model.
        prune_threshold: of timesteps whose loss is below this share of the range's largest no gradients are taken
            (released code: 0.05).
        p: probability of a timestep from all of T instead of the range (DeMe: 0.3; CIFAR-10: 0.4), or a list of one
            for each range (MEME).
        consistency: weight of the squared distance to the original's prediction (DeMe: 1).
        spectral: weight of that distance frequency by frequency, each over its magnitude in the image, besides
            (Spectral Diffusion, arXiv 2211.17106: both 0.1).
        projection: a C×C map after each stage of a U-Net, or on the input of each block, the identity at first, that
            trains with all weights (DeMe). It is folded into the model's own weights where that is exact; where it is
            not, it is kept in the model's file, and diffusers alone would leave it out. Only for method 'finetune',
            without `tree`; off where stages are not merged, with `models`, `prune` and
            `prune_budget`.
        antithetic: mirror half of a batch's timesteps; null is as the preset says.
        stage: number of the one stage to train, in this process; -1 trains all, as jobs.
        training: of each stage; each draws images, noise and timesteps of its own, from `training.seed` and its
            number.
        launch: where jobs run.
    """

    output_dir: str = "runs/decouple"
    method: str = "finetune"
    preset: Literal["paper", "released", "experts"] = "paper"
    num_stages: int = 4
    split: Literal["t", "log_snr", "gradient"] = "t"
    boundaries: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    prune: float | list[float] = 0.0
    prune_budget: float = 0.0
    prune_steps: int = 1000
    prune_threshold: float = 0.05
    p: float | list[float] | None = None
    consistency: float | None = None
    spectral: float = 0.0
    projection: bool | None = None
    antithetic: bool | None = None
    stage: int = -1
    training: StageTrainingConfig = field(default_factory=StageTrainingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in _PRESETS:
            raise UserError(f"preset='{self.preset}' is none of {', '.join(_PRESETS)}.")
        for name, value in _PRESETS[self.preset][0].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        limits = dict.fromkeys(("consistency", "spectral", "boundaries", "tree"), 0)
        check_numbers(self, **limits, num_stages=1, stage=-1, p=(0, 1))
        if self.method == "none":
            raise UserError("method='none' trains nothing: give one that does.")
        if self.projection is None:
            self.projection = self.method == "finetune" and not (
                self.tree or self.models or self.prune or self.prune_budget
            )
        if self.projection and self.method != "finetune":
            raise UserError(
                f"projection trains with all weights: set it to false, or method='{self.method}' to finetune."
            )
        if self.training.shard_base and (self.consistency or self.spectral):
            raise UserError(
                "training.shard_base goes without a consistency loss, which copies the model: set consistency to 0, "
                "and spectral."
            )
        self._check_unequal()
        if self.tree:
            self._check_tree()
        if self.timesteps != TimestepsConfig():
            raise UserError("timesteps are those of each stage: say with num_stages, split and boundaries which.")

    def _check_unequal(self) -> None:
        """Of stages that are not copies of the model."""
        ratios = self.prune if isinstance(self.prune, list) else [self.prune]
        if not all(0.0 <= ratio < 1.0 for ratio in ratios):
            raise UserError(f"prune={self.prune} must be a share from 0 to less than 1, or a list of them.")
        if not 0.0 <= self.prune_threshold <= 1.0:
            raise UserError(f"prune_threshold={self.prune_threshold} must be a share from 0 to 1.")
        if not 0.0 <= self.prune_budget <= 1.0 or self.prune_steps < 1:
            raise UserError(
                f"prune_budget={self.prune_budget} must be a share from 0 to 1, and prune_steps={self.prune_steps} at "
                f"least 1."
            )
        if self.prune_budget and (self.prune or self.models):
            raise UserError(
                "prune_budget decides what each range's copy of the model keeps: leave out prune and models."
            )
        for name in ("models", "prune", "prune_budget"):
            if getattr(self, name) and (self.method != "finetune" or self.tree or self.objective != "denoising"):
                raise UserError(
                    f"{name} goes with method='finetune' and objective='denoising', without tree: leave it out, or "
                    f"change these."
                )

    def _check_tree(self) -> None:
        if len(self.tree) != 2 or min(self.tree) < 0 or max(self.tree) == 0:
            raise UserError(
                f"tree={self.tree} must be two levels, of the image's end and of the noise's, such as [3, 9]; 0 grows "
                f"none there."
            )
        if self.boundaries:
            raise UserError("boundaries say where ranges begin, and so does tree: give one of them.")
        if self.projection:
            raise UserError("projection does not go with tree: leave it out, or set it to false.")
        if self.objective != "denoising":
            raise UserError(f"tree trains by objective='denoising', not '{self.objective}'.")
