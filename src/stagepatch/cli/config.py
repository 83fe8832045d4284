"""What each command takes. Importing this file does not import torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stagepatch.analysis.config import AnalyzeConfig as AnalyzeConfig
from stagepatch.analysis.config import DiagnoseConfig as DiagnoseConfig
from stagepatch.checkpoints import MemoryConfig
from stagepatch.core import check_numbers
from stagepatch.data import DataConfig
from stagepatch.evaluation.config import EvaluationConfig
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig
from stagepatch.search.config import MergeConfig as MergeConfig
from stagepatch.search.config import ScheduleConfig as ScheduleConfig
from stagepatch.studies.assemble_config import AssembleConfig as AssembleConfig
from stagepatch.studies.compare_config import CompareConfig as CompareConfig
from stagepatch.studies.decouple_config import DecoupleConfig as DecoupleConfig
from stagepatch.training.run_config import PretrainConfig as PretrainConfig
from stagepatch.training.run_config import TrainConfig as TrainConfig


@dataclass
class CacheConfig:
    """Encode images and captions once, for training a model with a VAE.

    The same command again goes on where it stopped. Under `accelerate launch` the processes share the work.

    Args:
        output_dir: takes the cache; give it as `--cache` to `stagepatch train`.
        model: a model directory as diffusers writes it, or a Hub id.
        dtype: that VAE and text encoders compute in.
        batch_size: images encoded at a time.
        data: images and captions.
    """

    output_dir: str = "runs/cache"
    model: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 8
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=1)


@dataclass
class SampleConfig:
    """Generate images with a model, patched or not.

    Args:
        output_dir: takes samples.safetensors, grid.png and the resolved config.
        model: a model directory, a Hub id, 'digits' or 'fashion'. A model with a VAE is sampled by its own
            pipeline and scheduler.
        dtype: of all its weights, but for those that its classes keep in float32.
        memory: how the denoiser is held in memory; see docs/memory.md.
        prompts: captions, in turn, for a model that takes them.
        classes: class labels, in turn, for a model that takes them; empty for all.
        patch: directory of a patch, or of what another method learned; empty for the base model.
        component: name of the denoiser that a patch of one goes on, in a pipeline that has several.
        patch_scale: factor on the patch's prompts; 1 as trained.
        schedule: YAML file of experts, or of LoRAs, by range of timesteps; see docs/experts.md. A patch beside it is
            put on each expert.
        call: further arguments of the pipeline's call, such as {height: 512, width: 768, num_frames: 1}.
        sampling: sampler, guidance, count and seed.
    """

    output_dir: str = "runs/sample"
    model: str = "digits"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    prompts: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    patch: str = ""
    component: str = ""
    patch_scale: float = 1.0
    schedule: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_numbers(self, classes=0)


@dataclass
class ExpertsConfig:
    """Write a file of LoRAs, each for a range of timesteps: for `sample --schedule`, or a pipeline of yours.

    Ranges may overlap, and leave gaps, where the model is alone; see docs/experts.md.

    Args:
        output: the file that is written.
        loras: .safetensors files, directories or Hub ids, whatever the pipeline's `load_lora_weights` takes.
        ranges: of each, from and to, 0 at the image's end and 1000 at pure noise: [[500, 1000], [0, 500]].
        weights: factor on each; 1 by default.
    """

    output: str = "experts.yaml"
    loras: list[str] = field(default_factory=list)
    ranges: list[list[float]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass
class EvaluateConfig(EvaluationConfig):
    """Measure a model against its training images, or one source of images against another: `stagepatch evaluate A B`.

    A and B are each a model; MODEL+LEARNED, with a patch, a LoRA, weights or a file of experts on it; images, in
    whatever form `data.source` takes, or samples.safetensors; of these IMAGES:train or IMAGES:held-out; or statistics
    (.npz). `digits` is the model, `digits:train` the data. See docs/evaluating.md. The same command again goes on
    where it was stopped.

    Args:
        output_dir: takes metrics.json and the resolved config; while it runs, what it goes on from.
        model: a model directory, 'digits' or 'fashion'; with `against`, any source.
        against: the source that `model` is measured against; empty for its training images, and for bundled data the
            held-out ones.
        metrics: that are measured, by key, such as [fid, kid, vendi]; 'all' for as many as can be; empty for the usual
            ones. See docs/evaluating.md.
        conditions: images whose labels or captions models are sampled with; empty for the other source's.
        save_statistics: a .npz that takes the statistics of `model`'s images, with the first seed; they can be
            measured against from then on.
        dtype: of the denoiser's weights, but for those that its class keeps in float32.
        memory: how it is held in memory; see docs/memory.md.
        patch: directory of a patch, or of what another method learned; with one, base and patched model are compared
            from the same noise.
        patch_scale: factor on the patch's prompts; 1 as trained.
        schedule: YAML file of experts by range of timesteps, which then are compared with the base. A patch beside it
            is put on each of them.
        seeds: sampling seeds; the spread and the paired difference are over these. The other side, where it is a
            model, has the seed after their highest.
        data: training images; with `against`, how images are read: at their own size without image_size.
        sampling: sampler and count; its seed is replaced by each of `seeds`.
    """

    output_dir: str = "runs/evaluate"
    model: str = "digits"
    against: str = ""
    metrics: list[str] = field(default_factory=list)
    conditions: str = ""
    save_statistics: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    patch: str = ""
    patch_scale: float = 1.0
    schedule: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_numbers(self, seeds=0)


@dataclass
class ParamsConfig:
    """Count parameters of named models and of a patch for them, without allocating weights.

    Two counts a model: with the prompts that `patch` asks for (by default one per token, as in the paper), and
    with a small grid of them: `patch.grid`, or by default 16×16 (video: 4×8×8).

    Args:
        models: DiT sizes, or SD-1.5, SDXL, SD3-medium, FLUX.1-dev, PixArt-Sigma, Wan2.1-1.3B, from their public
            configs; empty for these and DiT-B/2, L/2 and XL/2.
        patch: what the patch would learn.
    """

    models: list[str] = field(default_factory=list)
    patch: PatchConfig = field(default_factory=PatchConfig)


@dataclass
class DemoConfig:
    """Patch a bundled model, compare it with the base, and write a report.

    Args:
        output_dir: takes what was learned, the samples and report.html.
        data: 'fashion', a model that has room to gain, by the recommended recipe; or 'digits', a model at the level of
            its data, by the paper's prompts.
        quick: a run of half a minute: fewer steps and samples, labelled as such.
    """

    output_dir: str = "runs/demo"
    data: Literal["fashion", "digits"] = "fashion"
    quick: bool = False


@dataclass
class InspectConfig:
    """Say what a file or directory of stagepatch holds.

    Args:
        path: a patch, a model directory, a run, or a checkpoint.
    """

    path: str = "runs/demo"


@dataclass
class PushConfig:
    """Put what was learned on the Hub, with a card: `stagepatch push PATH REPO_ID`.

    The token is that of `hf auth login`, or HF_TOKEN. The card tells the base model, how to load, how it was trained,
    and shows samples and figures; see docs/sharing.md.

    Args:
        path: directory of a patch, a LoRA, a stage's LoRA, or of several denoisers' ones; or a file of experts, with
            what it names.
        repo_id: such as 'name/patch'; made if it is not there.
        private: make it a private one.
        revision: branch that it goes to, made if it is not there; empty for the main one.
        dry_run: a new folder that takes what would be uploaded; nothing is.
        samples: output_dir of `stagepatch sample`, whose images and prompts are shown.
        evaluation: output_dir of `stagepatch evaluate --patch`, whose figures are told; by default those in `path`.
        prompt: words that call up what was learned.
    """

    path: str = ""
    repo_id: str = ""
    private: bool = False
    revision: str = ""
    dry_run: str = ""
    samples: str = ""
    evaluation: str = ""
    prompt: str = ""


@dataclass
class ExportConfig:
    """Write LoRAs in the key names of other programs: `stagepatch export PATH OUTPUT --to kohya`.

    Those limited to a range of timesteps have it in their names and metadata, and in an 'experts.yaml' beside them;
    see docs/sharing.md.

    Args:
        path: directory of a LoRA, of stages of LoRAs, or of several denoisers' ones; or a file of experts that are
            LoRAs.
        output: directory that takes the files, which have its name.
        to: 'diffusers', `pipe.load_lora_weights`; 'kohya', sd-scripts and musubi-tuner, and what reads their LoRAs; or
            'comfyui', its 'Load LoRA'.
        model_class: of the denoiser, such as 'FluxTransformer2DModel', where the files do not say it.
    """

    path: str = ""
    output: str = ""
    to: Literal["diffusers", "kohya", "comfyui"] = "diffusers"
    model_class: str = ""
