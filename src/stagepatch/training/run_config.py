"""What one training run takes."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stagepatch.checkpoints import MemoryConfig
from stagepatch.core import check_numbers
from stagepatch.data import DataConfig
from stagepatch.diffusion import ObjectiveConfig, TimestepsConfig, WeightingConfig
from stagepatch.methods import MethodConfig
from stagepatch.models import ModelConfig
from stagepatch.patch import PatchConfig
from stagepatch.training.balancing_config import BalancingConfig
from stagepatch.training.config import TrainingConfig
from stagepatch.training.ddo_config import DDOConfig
from stagepatch.training.validation_config import ValidationConfig


@dataclass
class TrainConfig(MethodConfig):
    """Train a patch on top of a converged model, or by another method to compare with it.

    Args:
        output_dir: directory of the run; the same command again goes on where it stopped.
        model: a model directory as diffusers writes it, a Hub id, or 'digits' or 'fashion', the bundled models.
        component: name of the denoiser that is trained, in a model that has several (Wan 2.2's of 14B:
            'transformer', 'transformer_2'); empty for all, one after the other. Each is trained in its own noise
            levels.
        dtype: of the frozen model's weights, and of the text encoders that make the cache; what is learned is float32.
        memory: how the frozen model is held in memory; see docs/memory.md.
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        cache_batch_size: images, or frames of videos, encoded at a time for the cache.
        assistant_lora: LoRA that is on the model while it trains and at no other time, for one that was distilled: a
            file, directory or Hub id that the pipeline's own loader reads. See docs/distilled.md.
        start_from: directory of what the same method learned before, to train on from; empty to start from the model.
        objective: 'denoising', the model's own loss; 'ddo', which tells training images from the model's samples; or
            'samples', the model's own loss on its samples, which makes it worse: a guide to sample away from.
        ddo: of objective 'ddo'; 'samples' takes its fakes and sampling.
        weighting: of timesteps in the loss.
        timesteps: which ones are trained on, and how often.
        balancing: of the losses of intervals of timesteps; see docs/balancing.md.
        validation: pictures while it trains.
        data: training images: the ones that the model was trained on.
        training: optimizer and bookkeeping.
    """

    output_dir: str = "runs/train"
    model: str = "digits"
    component: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cache: str = ""
    cache_batch_size: int = 8
    assistant_lora: str = ""
    start_from: str = ""
    objective: Literal["denoising", "ddo", "samples"] = "denoising"
    ddo: DDOConfig = field(default_factory=DDOConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, cache_batch_size=1)

    def learns_by(self) -> dict[str, Any]:
        """The objective and its choices, and a young method's, as what a run must share to go on: wherever its files
        are."""
        ddo = {"ddo": replace(self.ddo, fakes="")} if self.objective != "denoising" else {}
        is_balanced = self.balancing.name != "none"
        balancing = {"balancing": replace(self.balancing, similarity="")} if is_balanced else {}
        wavelet = {"wavelet": self.wavelet} if self.method == "wavelet" else {}
        return {"objective": self.objective, **ddo, **balancing, **wavelet}


@dataclass
class PretrainConfig:
    """Train a DiT, or a DDPM U-Net, from scratch, all weights.

    Args:
        method: 'finetune', the weights alone; 'joint', a patch with them, kept in 'patch' in output_dir (Table 6 of
            DMP, arXiv 2405.17825).
        output_dir: directory of the run; the same command again goes on where it stopped.
        parts: directory or Hub id of a model with a `vae/`, and for text a `text_encoder/` and `tokenizer/` (CLIP with
            its projection): the model then learns in that VAE's latents, of the pooled text, and these are put beside
            it. Empty for images in pixels.
        cache: directory of the latents and captions, made first; by default 'cache' in output_dir.
        model: size and conditioning.
        objective: noise schedule and prediction target.
        balancing: of the losses of intervals of timesteps; see docs/balancing.md.
        data: training images.
        patch: of method 'joint'.
        training: optimizer and bookkeeping; with 0 steps the model is kept as it was drawn.
    """

    output_dir: str = "runs/pretrain"
    method: Literal["finetune", "joint"] = "finetune"
    parts: str = ""
    cache: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
