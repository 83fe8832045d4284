"""The choices of an analysis."""

from dataclasses import dataclass, field

from stagepatch.data import DataConfig


@dataclass
class AnalyzeConfig:
    """Show where over the timesteps a model has room, and where what was learned used it.

    Args:
        output_dir: takes report.html, analysis.json, the pictures and the resolved config.
        model: a model directory as diffusers writes it, a Hub id, or 'digits' or 'fashion', bundled models.
        gradients: cosine between the timesteps' mean gradients (DeMe, arXiv 2410.06664, Fig. 1a).
        losses: the loss at every timestep, of the model and of each of `learned`.
        snapshots: directory of a run that kept some (`training.snapshot_every`): the gradients are those of each of
            its snapshots in place of the model's.
        learned: directories of what methods learned on the model, or of whole models, each 'directory' or
            'name=directory'.
        stages: two or more of what was trained on from the model, to compare their task vectors: model directories,
            LoRAs or weights, each 'directory' or 'name=directory'; or one directory that has them in 'stages/'.
        timesteps: how many, each in the middle of one of as many equal ranges.
        samples: draws of image and noise at each timestep (Fig. 1a: 512); an even number.
        batch_size: samples at a time.
        parameters: regular expression, found anywhere in the names of the weights that gradients are taken of; empty
            for all.
        projection: numbers to which each gradient is reduced at random, so that it fits in memory; a cosine then has
            a standard error of at most 1/√projection. 0 keeps gradients whole.
        memory_gib: the gradients of all timesteps may take so much memory [GiB].
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        seed: of images, noise and projection.
        data: training images: the ones that the model was trained on.
    """

    output_dir: str = "runs/analyze"
    model: str = "digits"
    gradients: bool = True
    losses: bool = True
    snapshots: str = ""
    learned: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    timesteps: int = 20
    samples: int = 512
    batch_size: int = 64
    parameters: str = ""
    projection: int = 0
    memory_gib: float = 4.0
    cache: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
