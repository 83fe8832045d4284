"""The choices of a training run."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stagepatch.core import check_numbers

# Where in a run's directory snapshots are, by step, and averages for post-hoc EMA, by sigma_rel and step.
SNAPSHOTS, POSTHOC_EMA = "snapshots", "posthoc_ema"
# What the names of losses on held-out images begin with in a run's log; then comes a range of noise levels, or 'all'.
HELD_OUT, HELD_OUT_BASE = "held_out/", "held_out_base/"
# What changes nothing that is learned. The second line is what a run that ran out of memory may go on with: the same
# is computed in other pieces (of which the balance losses of a patch are means).
BOOKKEEPING = (
    *("log_every", "checkpoint_every", "snapshot_every", "shard_base"),
    *("gradient_accumulation_steps", "gradient_checkpointing"),
    *("tensorboard", "trackers", "tracker_project_name", "report_every"),
)

_COUNTS = ("batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every")
_AMOUNTS = (
    *("steps", "learning_rate", "warmup_steps", "max_grad_norm", "seed", "snapshot_every", "ema_power"),
    *("weight_decay", "report_every", "posthoc_ema"),
)
_SHARES = ("label_dropout", "ema_decay", "adam_beta1", "adam_beta2")
# What the numbers may be.
_LIMITS: dict[str, Any] = {**dict.fromkeys(_COUNTS, 1), **dict.fromkeys(_AMOUNTS, 0), **dict.fromkeys(_SHARES, (0, 1))}


@dataclass
class TrainingConfig:
    """Optimizer, schedule, precision and bookkeeping. Defaults are DMP's (arXiv 2405.17825) where it says.

    Args:
        steps: optimizer steps in all.
        batch_size: images a step, over all processes (DMP: 128).
        gradient_accumulation_steps: parts in which each process computes its share of a batch.
        optimizer: of PyTorch 'adamw' (DMP) and 'muon' (of matrices; what else there is goes to AdamW), 'adamw_8bit' of
            bitsandbytes, 'adafactor' of transformers, 'prodigy' of prodigyopt (learning_rate 1), 'schedule_free' of
            schedulefree; see docs/optimizers.md.
        optimizer_options: further arguments of the optimizer's class, such as {"eps": 1e-6}.
        learning_rate: the optimizer's rate (DMP: 1e-4).
        lr_scheduler: diffusers' name: 'constant' (DMP), 'linear' or 'cosine', the latter two decaying to zero.
        warmup_steps: steps over which the rate rises from zero.
        weight_decay: the optimizer's decay (DMP: 0).
        adam_beta1: first beta of AdamW and of what is built on it.
        adam_beta2: their second beta.
        max_grad_norm: clip the gradient's norm to this; 0 does not clip (DMP).
        ema_decay: average the trained weights with this decay and save the average; 0 does not average (DMP).
        ema_power: let the decay rise to ema_decay as 1 − (1 + step)^−power (DeMe's released code: 0.75); 0 lets it
            rise as (1 + step)/(10 + step).
        posthoc_ema: keep averages of these sigma_rel too, and save them under 'posthoc_ema/' with each snapshot and at
            the end: the paper's are [0.05, 0.1] (arXiv 2312.02696). `stagepatch merge --run` then makes the average of
            any other sigma_rel. Needs snapshot_every; empty keeps none.
        label_dropout: share of class labels, or of captions, replaced by none, for guidance (DiT: 0.1).
        mixed_precision: precision of the forward and backward pass, by accelerate; what trains stays in float32.
        gradient_checkpointing: keep the activations of one block at a time and compute the others' anew in the
            backward pass: less memory, a third more time.
        shard_base: share a frozen base among the processes, each with a part of every weight (FSDP2); see
            docs/sharding.md.
        compile: run the denoiser through torch.compile.
        seed: of data order, noise, timesteps and initialisation.
        log_every: steps between log records.
        checkpoint_every: steps between checkpoints to resume from.
        snapshot_every: steps between copies of the (averaged) result under 'snapshots/'; 0 keeps none.
        tensorboard: write TensorBoard events beside log.jsonl.
        trackers: what else the log and pictures go to, by accelerate's names: 'wandb', 'trackio', …; see
            docs/watching.md.
        tracker_project_name: of the trackers; the run is called by its output_dir.
        report_every: seconds between writings of report.html, a page on the run, while it trains; 0 writes none. The
            first comes after so long.
    """

    steps: int = 50_000
    batch_size: int = 128
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "schedule_free", "muon"] = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0
    ema_power: float = 0.0
    posthoc_ema: list[float] = field(default_factory=list)
    label_dropout: float = 0.1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    shard_base: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    snapshot_every: int = 0
    tensorboard: bool = True
    trackers: list[str] = field(default_factory=list)
    tracker_project_name: str = "stagepatch"
    report_every: float = 60.0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UserError: by name of the setting.
        """
        check_numbers(self, "training.", **_LIMITS)
