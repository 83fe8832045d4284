"""What a comparison takes."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stagepatch.core import UserError, as_user_error, check_numbers, check_values
from stagepatch.diffusion import TimestepsConfig, WeightingConfig
from stagepatch.evaluation.config import EvaluationConfig
from stagepatch.methods import LoRAConfig, WaveletConfig
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig
from stagepatch.studies.launch_jobs import LaunchConfig
from stagepatch.training import BalancingConfig, DDOConfig, TrainingConfig

# Of an entry: its dictionaries, and what they are fields of.
PARTS: dict[str, Any] = {
    "patch": PatchConfig,
    "lora": LoRAConfig,
    "wavelet": WaveletConfig,
    "weighting": WeightingConfig,
    "timesteps": TimestepsConfig,
    "balancing": BalancingConfig,
    "ddo": DDOConfig,
    "training": TrainingConfig,
    "sampling": SamplingConfig,
}
ITSELF = "{learned}"  # as a guide: what the entry learns


@dataclass
class EntryConfig:
    """A row of the comparison. What it leaves out is as for all.

    Args:
        name: how the row is called.
        method: 'dmp', 'prompt_tuning', 'finetune', 'joint', 'bitfit', 'lora', 'wavelet', or 'none', the
            base.
        patch: fields of the patch's config.
        lora: fields of the LoRA's config.
        wavelet: fields of the wavelet gates' config.
        weighting: fields of the loss weighting's config.
        objective: 'denoising', the model's own loss (the default), 'ddo', which tells training images from the
            model's samples, or 'samples', the model's own loss on its samples.
        timesteps: fields of the timesteps' config.
        balancing: fields of the config that balances intervals of timesteps.
        ddo: fields of the DDO config. The samples are shared by all jobs on the comparison's model.
        training: fields of the training config that differ from the common one.
        sampling: fields of the sampling config that differ, such as more steps; not the number of images, nor the
            seed. An untrained entry with some is what anyone has without training. '{seed}' in its guide stands for
            the training seed; the guide '{learned}' is what the entry itself learns, which then is not put on the
            model.
        start_from: directory of what the same method learned before, to train on from; '{seed}' as in `model`.
        after: name of an entry above, whose result of the same training seed is trained on from.
        num_stages: ranges of timesteps, each with a copy, a LoRA or else of its own, which is trained on it alone for
            all of `training`'s steps, and used in it alone, as by `decouple --preset experts`; 0: one for all.
        control: why a method must beat this row, such as 'steps', 'parameters' or 'free'; empty for a method.
        model: what the entry starts from, if not the comparison's own model; '{seed}' in it stands for the training
            seed, as in 'runs/merged-{seed}'.
        schedule: experts by timestep (see docs/experts.md) that are sampled in place of the model alone; '{seed}' as
            above. Only with method 'none'.
        learned: directory of what was learned before and is not trained on, put on the model, or on each expert of
            `schedule`; '{seed}' as above. Only with method 'none'.
    """

    name: str
    method: str
    patch: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    wavelet: dict[str, Any] = field(default_factory=dict)
    weighting: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=dict)
    balancing: dict[str, Any] = field(default_factory=dict)
    objective: Literal["denoising", "ddo", "samples"] = "denoising"
    ddo: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""
    after: str = ""
    num_stages: int = 0
    control: str = ""
    model: str = ""
    schedule: str = ""
    learned: str = ""

    def __post_init__(self) -> None:
        with as_user_error(f"Entry '{self.name}'", UserError):
            check_numbers(self, num_stages=0)
            for name, config_class in PARTS.items():
                check_values(getattr(self, name), config_class, name)


@dataclass
class CompareConfig(EvaluationConfig):
    """Train and measure methods alike, and put them in one table.

    The same command again goes on with what is unfinished and skips what is done.

    Args:
        output_dir: takes a directory a job, and the table as Markdown, CSV, JSON and a page.
        model: a model directory, 'digits' or 'fashion'.
        entries: the rows: each with a name, a method, and what it has of its own under patch, lora, weighting,
            ddo, training and sampling.
        hours: without entries, the rows are found, and steps, images and training seeds so chosen that all takes so
            many hours on this machine; see docs/comparing.md. 0 needs entries.
        training_seeds: each entry is trained with each.
        sampling_seeds: each checkpoint is measured with each: at least 3, the same noise for all.
        evaluate_every: steps between checkpoints that are measured; 0 measures the last alone.
        metric: the table's metric, a key of the metrics.
        second_extractor: FID against held-out images is measured in these features too, on the same samples.
        dtype: of frozen models' weights, in training and sampling.
        cache_batch_size: images, or frames of videos, encoded at a time for the cache.
        training: common to all entries; its seed and snapshot_every are set by the comparison. With `hours`, its
            learning_rate is the one that the model was trained with, and the rows' are shares of it.
        sampling: common to all; its seed is set by the comparison.
        launch: where jobs run.
        quick: a fortieth of the steps, one training seed, few samples: to see that it works.
    """

    output_dir: str = "runs/compare"
    model: str = "digits"
    entries: list[EntryConfig] = field(default_factory=list)
    hours: float = 0.0
    training_seeds: list[int] = field(default_factory=lambda: [0])
    sampling_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    evaluate_every: int = 0
    metric: str = "fid_held_out"
    second_extractor: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache_batch_size: int = 8
    training: TrainingConfig = field(default_factory=TrainingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    quick: bool = False

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("hours", "training_seeds", "sampling_seeds", "evaluate_every"), 0)
        check_numbers(self, **limits, cache_batch_size=1)
