"""What a search for a schedule takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.data.config import DataConfig
from stagepatch.sampling.config import SamplingConfig


@dataclass
class ZooEntry:
    """A model that a step may be given to, besides the base.

    Args:
        name: how it is called in schedules.
        model: a model directory, a Hub id, or 'digits'.
        learned: in place of a model, directory of a patch, a LoRA or weights, on top of the base.
    """

    name: str
    model: str = ""
    learned: str = ""


@dataclass
class ScheduleConfig:
    """Search, under a time budget, which model of a zoo to use for each step of sampling (arXiv 2306.08860).

    The same command again goes on where it stopped; with more evaluations it searches on.

    Args:
        output_dir: takes schedule.yaml (for `stagepatch sample --schedule`), search.json, costs.json, search.png and
            metrics.json.
        model: the base: a model directory, a Hub id, or 'digits'.
        zoo: further models, each with a name, and `model` or `learned`.
        budget: seconds per image, as a share of the base model's at all steps; what a step costs is measured.
        drop_steps: let steps be left out too; needs a sampler that can be told its timesteps.
        evaluations: schedules that are sampled and measured in the search.
        metric: that schedules are chosen by, against the training images; FID and KID are to be low, the others high.
        extractor: features for the metrics: 'digits' or 'inception'.
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        seeds: sampling seeds of the final comparison with the base at the same budget; not the search's.
        data: training images.
        sampling: sampler, the steps to choose among, images per evaluation, and the search's seed.
    """

    output_dir: str = "runs/schedule"
    model: str = "digits"
    zoo: list[ZooEntry] = field(default_factory=list)
    budget: float = 0.5
    drop_steps: bool = True
    evaluations: int = 100
    metric: Literal["fid_train", "kid", "precision", "recall"] = "fid_train"
    extractor: str = "digits"
    cache: str = ""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(scheduler="dpmsolver++", num_images=1000))
