"""What merging takes, what a search for its weights takes, and what a search for a model schedule takes."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.core import UserError, check_numbers
from stagepatch.evaluation.config import EvaluationConfig
from stagepatch.merging import MergeMethod
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

    def __post_init__(self) -> None:
        check_numbers(self, "search.", evaluations=1, seed=0)


@dataclass
class MergeConfig(EvaluationConfig):
    """Merge models that were trained on from one base, or their LoRAs, into one (DeMe, arXiv 2410.06664).

    With `search.strategies` the weights are searched for, on `data`, `sampling` and `extractor`. Fisher merging draws
    its samples from `data`, the training images.

    Args:
        base: the model that the stages were trained from; may be left out where `stagepatch decouple` wrote the
            stages, which say so themselves.
        stages: model directories; or directories of LoRAs, and then all of them; or the one output_dir of
            `stagepatch decouple`, for all of its stages in order.
        run: in place of base and stages, directory of a training with snapshots: these are the stages, and its result
            the base. For a patch, LoRA or weights, base may still say which model they are for.
        posthoc_ema: in place of weights, make the average with this sigma_rel out of those that the run kept
            (arXiv 2312.02696; training.posthoc_ema); 0 for none.
        weights: of each stage's task vector; 1 takes it whole. Of 'fisher', shares of a mean.
        merge_method: 'sum' of weighted task vectors (DeMe); 'ties' (arXiv 2306.01708), which needs ties_keep; 'dare'
            (arXiv 2311.03099) and 'dare_ties', with signs elected as in TIES, which need dare_drop; 'fisher' (arXiv
            2111.09832), which needs fisher_samples: the mean of the stages, each weight by how much its stage's loss
            feels it. LoRAs: 'sum' or 'dare'. Null is 'ties' where ties_keep is given, else 'sum'.
        ties_keep: share of each tensor's task vector that TIES keeps, the largest; with 'dare_ties', of what is left
            of it, and 0 keeps that whole.
        dare_drop: share of each task vector that DARE drops at random (0.9 and more in the paper); the rest is
            rescaled.
        fisher_samples: draws of image, noise and timestep for the Fisher of each stage (256, say), in its own range
            of timesteps where `stagepatch decouple` made it.
        fisher_normalize: divide each stage's Fisher by its norm, as the authors' code does; false takes the paper's
            formula as it stands, where a stage of larger gradients weighs more.
        seed: of what DARE drops, and of a Fisher's draws.
        output_dir: takes the merged model as an ordinary model directory, or the merged LoRA; and what a search found.
        search: for weights.
        sampling: of a search: sampler, count (DeMe: 5,000 images) and the noise's seed.
    """

    base: str = ""
    stages: list[str] = field(default_factory=list)
    run: str = ""
    posthoc_ema: float = 0.0
    weights: list[float] = field(default_factory=list)
    merge_method: Literal["sum", "ties", "dare", "dare_ties", "fisher"] | None = None
    ties_keep: float = 0.0
    dare_drop: float = 0.0
    fisher_samples: int = 0
    fisher_normalize: bool = True
    seed: int = 0
    output_dir: str = "runs/merged"
    search: SearchConfig = field(default_factory=SearchConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_images=5000), kw_only=True)

    def __post_init__(self) -> None:
        check_numbers(self, posthoc_ema=0, fisher_samples=0, seed=0)
        is_fisher = self.method.kind == "fisher"
        if is_fisher and self.fisher_samples < 1:
            raise UserError("merge_method='fisher' needs fisher_samples, of which its Fishers are means: 256, say.")
        if not is_fisher and (self.fisher_samples or not self.fisher_normalize):
            raise UserError(
                f"fisher_samples and fisher_normalize are options of merge_method fisher, not of "
                f"'{self.method.kind}': leave them out."
            )
        if is_fisher and self.search.strategies:
            raise UserError(
                "Weights of merge_method='fisher' are not searched for: a search begins with the base, all weights 0, "
                "which is no mean of the stages. Give weights."
            )

    @property
    def method(self) -> MergeMethod:
        """How stages are merged."""
        name = self.merge_method or ""
        return MergeMethod(name, self.ties_keep, self.dare_drop, self.fisher_normalize, self.seed)


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
        budget_ms: in place of `budget`, milliseconds per image at `sampling.batch_size` on this machine, all that
            sampling does besides the models counted too; 0 for `budget`.
        drop_steps: let steps be left out too; needs a sampler that takes timesteps.
        evaluations: model schedules that are sampled and measured in the search.
        predictor: what chooses the schedules to evaluate: 'ridge', a ridge regression, among children of the best;
            'lstm', an LSTM that learns to rank schedules, and an evolution by what it says (OMS-DPM).
        random_evaluations: of 'lstm': schedules that are drawn at random and evaluated before it proposes any.
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
    budget_ms: float = 0.0
    drop_steps: bool = True
    evaluations: int = 100
    predictor: Literal["ridge", "lstm"] = "ridge"
    random_evaluations: int = 40
    metric: Literal["fid_train", "kid", "precision", "recall"] = "fid_train"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    storage: str = ""
    name: str = "schedule"
    prune: bool = False
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig("dpmsolver++", num_images=1000), kw_only=True
    )

    def __post_init__(self) -> None:
        amounts = dict.fromkeys(("budget", "budget_ms", "seeds", "random_evaluations"), 0)
        check_numbers(self, **amounts, evaluations=1)
