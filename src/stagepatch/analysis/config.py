"""The choices of an analysis."""

from dataclasses import dataclass, field

from stagepatch.core import check_numbers
from stagepatch.data import DataConfig
from stagepatch.sampling import SamplingConfig


@dataclass
class AnalyzeConfig:
    """Show where over the timesteps a model has room, and where what was learned used it.

    Args:
        output_dir: takes report.html, analysis.json, the pictures and the resolved config.
        model: a model directory as diffusers writes it, a Hub id, or 'digits' or 'fashion', bundled models.
        gradients: cosine between the timesteps' mean gradients (DeMe, arXiv 2410.06664, Fig. 1a).
        losses: the loss at every timestep, of the model and of each of `learned`.
        snapshots: directory of a run that kept some (`training.snapshot_every`): the gradients are those of each of
            its snapshots in place of the model's; of a patch's run, with `patch`, the gate is shown over them.
        learned: directories of what methods learned on the model, or of whole models, each 'directory' or
            'name=directory'.
        stages: two or more of what was trained on from the model, to compare their task vectors: model directories,
            LoRAs or weights, each 'directory' or 'name=directory'; or directories that have them in 'stages/': two of
            these, of different training seeds, give the control, ranges that were trained twice.
        patch: directory of a patch, to show its gate and its effect, and to compare samples with it; with gate false,
            of what any method learned; empty for none.
        gate: activation of the patch's gate over timesteps and prompts, its temporal and spatial bias and its entropy
            (DMP, arXiv 2405.17825, Fig. 5, Fig. 7).
        effect: how far the patch changes the prediction and each block's output, by timestep.
        gate_timesteps: how many timesteps the gate is asked at, evenly spaced; 0 for all (paper: 1,000).
        gate_conditions: most classes or captions that the activation is the mean over, where the gate sees them.
        structure_samples: samples, with and without the patch, of which correlation and cosine between any two are
            compared (DMP, Table 5: 1,000 latents); 0 for none.
        prompts: captions, in turn, for the gate and the samples of a model that takes them; empty for those of `data`.
        sampling: how `structure_samples` are made, which takes the place of its num_images.
        timesteps: how many, each in the middle of one of as many equal ranges.
        samples: draws of image and noise at each timestep (Fig. 1a: 512); an even number.
        batch_size: samples, or the gate's timesteps, at a time.
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
    patch: str = ""
    gate: bool = True
    effect: bool = False
    gate_timesteps: int = 0
    gate_conditions: int = 8
    structure_samples: int = 0
    prompts: list[str] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    timesteps: int = 20
    samples: int = 512
    batch_size: int = 64
    parameters: str = ""
    projection: int = 0
    memory_gib: float = 4.0
    cache: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        amounts = ("gate_timesteps", "structure_samples", "projection", "memory_gib", "seed")
        counts = dict.fromkeys(("gate_conditions", "batch_size"), 1)
        check_numbers(self, **dict.fromkeys(amounts, 0), **counts, timesteps=2, samples=2)


@dataclass
class DiagnoseConfig:
    """Say what a model is limited by and what is worth trying, before you train: `stagepatch diagnose MODEL DATA`.

    Args:
        output_dir: takes report.html, diagnosis.json, the pictures and the resolved config.
        model: a model directory as diffusers writes it, a Hub id, or 'digits' or 'fashion', bundled models.
        held_out: images of the same kind that the model was not trained on, read as `data` is; empty for those of the
            bundled data, or for the share that was held out in training, data.held_out.
        snapshots: directory of a run that kept some (`training.snapshot_every`): what the mean of their later half
            would give; empty for none.
        minutes: for the trainings that are tried, two for each rate and one; the rest takes about as long.
        steps: of each of them, whatever time they take; 0 for as many as `minutes` allow, from 50 to 2,000.
        rates: learning rates that are tried.
        batch_size: images a step.
        images: most training images, and most held-out ones, that losses are measured on.
        timesteps: how many, each in the middle of one of as many equal ranges.
        samples: images that each sampler's FID is of, where model and data are bundled ones; 0 measures none.
        cache: directory of the latents and captions of a model with a VAE, made first if it is not there; empty for
            'cache' in output_dir.
        seed: of images, noise and trainings.
        data: training images: the ones that the model was trained on.
    """

    output_dir: str = "runs/diagnose"
    model: str = "digits"
    held_out: str = ""
    snapshots: str = ""
    minutes: float = 5.0
    steps: int = 0
    rates: list[float] = field(default_factory=lambda: [1e-4, 1e-3])
    batch_size: int = 64
    images: int = 2000
    timesteps: int = 20
    samples: int = 500
    cache: str = ""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        amounts = dict.fromkeys(("minutes", "steps", "rates", "samples", "seed"), 0)
        check_numbers(self, **amounts, batch_size=1, images=1, timesteps=1)
