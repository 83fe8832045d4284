"""What merging takes, what a search for its weights takes, and what a search for a model schedule takes."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.evaluation.config import EvaluationConfig
from stagepatch.sampling.config import SamplingConfig


@dataclass
class SearchConfig:
    """A search for the weights of the stages: those whose samples have the lowest FID.

    Every strategy begins with the base (all weights 0) and the mean (1 / stages each), and every evaluation samples
    from the same noise.

    Args:
        strategies: any of 'grid', two levels (DeMe); 'tpe' (NeurIPS 2011, Bergstra et al.) and 'cma', CMA-ES
            (arXiv 1604.00772), by Optuna; 'lcsc', CMA-ES from the best of some averages, for the snapshots of a run
            (arXiv 2404.02241, whose weights may be negative: set low to -1). Empty for no search.
        evaluations: of each strategy but the grid, which takes as many as it has points: with the defaults and four
            stages 82 and then some 80 (`len(coarse) ** stages`, `len(fine) ** stages`).
        coarse: weights of the grid's first level, for each stage.
        fine: what is added to the best weights of the first level, for each stage, to make the second.
        low: least weight of a stage; at most 0, which is the base.
        high: greatest weight of a stage.
        metric: FID against the training images, or against the held-out third of digits. Weights that were chosen on
            held-out images have seen them: FID against these then says nothing about new images.
        seed: of all strategies but the grid; the noise of the samples is `sampling.seed`.
        storage: where evaluations are kept: a database's URL as Optuna takes it (postgresql://..., sqlite:///...), or
            a journal file; empty for 'search.journal' in output_dir. Start the command again, on as many machines as
            see the storage, to share the work.
        name: of the search; several searches in one database need several names.
        prune: give up an evaluation whose FID of the first quarter of the images is above the median of the others'.
    """

    strategies: list[Literal["grid", "tpe", "cma", "lcsc"]] = field(default_factory=list)
    evaluations: int = 60
    coarse: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    fine: list[float] = field(default_factory=lambda: [-0.25, 0.0, 0.25])
    low: float = 0.0
    high: float = 1.0
    metric: Literal["fid_train", "fid_held_out"] = "fid_train"
    seed: int = 0
    storage: str = ""
    name: str = "merge"
    prune: bool = False


@dataclass
class MergeConfig(EvaluationConfig):
    """Merge models that were trained on from one base, or their LoRAs, into one (DeMe, arXiv 2410.06664).

    With `search.strategies` the weights are searched for, on `data`, `sampling` and `extractor`.

    Args:
        base: the model that the stages were trained from; may be left out where `stagepatch decouple` wrote the
            stages, which say so themselves.
        stages: model directories; or directories of LoRAs, and then all of them; or the one output_dir of
            `stagepatch decouple`, for all of its stages in order.
        run: in place of base and stages, directory of a training with snapshots: these are the stages, and its result
            the base. For a patch, LoRA or weights, base may still say which model they are for.
        posthoc_ema: in place of weights, make the average with this sigma_rel out of those that the run kept
            (arXiv 2312.02696; training.posthoc_ema); 0 for none.
        weights: of each stage's task vector; 1 takes it whole.
        ties_keep: share of each tensor's task vector that TIES-merging (arXiv 2306.01708) keeps; 0 is the plain sum.
        output_dir: takes the merged model as an ordinary model directory, or the merged LoRA; and what a search found.
        search: for weights.
        sampling: of a search: sampler, count (DeMe: 5,000 images) and the noise's seed.
    """

    base: str = ""
    stages: list[str] = field(default_factory=list)
    run: str = ""
    posthoc_ema: float = 0.0
    weights: list[float] = field(default_factory=list)
    ties_keep: float = 0.0
    output_dir: str = "runs/merged"
    search: SearchConfig = field(default_factory=SearchConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=5000), kw_only=True)


@dataclass
class ZooEntry:
    """A model that a step may be given to, besides the base.

    Args:
        name: how it is called in model schedules.
        model: a model directory, a Hub id, 'digits' or 'fashion'.
        learned: in place of a model, directory of a patch, a LoRA or weights, on top of the base.
    """

    name: str
    model: str = ""
    learned: str = ""


@dataclass
class ScheduleConfig(EvaluationConfig):
    """Search, under a time budget, which model of a zoo to use for each step of sampling (arXiv 2306.08860).

    The same command again goes on where it stopped; with more evaluations it searches on.

    Args:
        output_dir: takes schedule.yaml (for `stagepatch sample --schedule`), search.json, costs.json, search.png and
            metrics.json.
        model: the base: a model directory, a Hub id, 'digits' or 'fashion'.
        zoo: further models, each with a name, and `model` or `learned`.
        budget: seconds per image, as a share of the base model's at all steps; what a step costs is measured.
        drop_steps: let steps be left out too; needs a sampler that takes timesteps.
        evaluations: model schedules that are sampled and measured in the search.
        metric: that model schedules are chosen by, against the training images; FID and KID are to be low, the others
            high.
        seeds: sampling seeds of the final comparison with the base at the same budget; not the search's.
        storage: where evaluations are kept: a database's URL as Optuna takes it (postgresql://..., sqlite:///...), or
            a journal file; empty for 'search.journal' in output_dir. Start the command again, on as many machines as
            see the storage, to share the work.
        name: of the search; several searches in one database need several names.
        prune: give up an evaluation whose metric of the first quarter of the images is worse than the median of the
            others'.
        sampling: sampler, the steps to choose among, images per evaluation, and the search's seed.
    """

    output_dir: str = "runs/schedule"
    model: str = "digits"
    zoo: list[ZooEntry] = field(default_factory=list)
    budget: float = 0.5
    drop_steps: bool = True
    evaluations: int = 100
    metric: Literal["fid_train", "kid", "precision", "recall"] = "fid_train"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    storage: str = ""
    name: str = "schedule"
    prune: bool = False
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig("dpmsolver++", num_images=1000), kw_only=True
    )
