"""What a model is limited by, measured in minutes: its losses, short trainings, gradients, what methods would cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from stagepatch.analysis.changes import Change, change
from stagepatch.analysis.config import DiagnoseConfig
from stagepatch.analysis.free import FreeWin
from stagepatch.analysis.gradients import GradientSimilarity, gradient_similarity, near_and_far
from stagepatch.analysis.losses import estimate, loss_at_timesteps
from stagepatch.analysis.prospects import Prospect, measure_prospects
from stagepatch.analysis.result import as_plain
from stagepatch.analysis.samples import Samples, even_timesteps
from stagepatch.analysis.trials import Trial, Trials, density_at
from stagepatch.analysis.verdicts import Verdicts, far_cosine, how_stages_agree, judge
from stagepatch.core import UserError
from stagepatch.diffusion import Objective

_TRIED_ON = 256  # images, whose losses before and after a training are compared one by one
_GRADIENT_SAMPLES = 512
_WHOLE_GRADIENTS = 2**27  # numbers that are kept of all timesteps' gradients before they are projected
_PROJECTION = 65_536
_FEWEST_STEPS, _MOST_STEPS = 50, 2000
_VERSION = 1


@dataclass
class Diagnosis:
    """All that was measured, and what it says.

    Args:
        trained, held_out: the model's losses [n, m] on training images and on others, a column an image.
        gap: of the mean loss, held-out against training images.
        steps: of each training.
        rates: that were tried, as are the next two, which are changes of the held-out loss.
        longer: by training on; and the same on training images.
        copies: by copies for ranges of timesteps, to the least loss that one model has.
        density: by training with another density of t, of the loss weighted by it; `density_plain` of the loss of
            timesteps alike.
        far: mean cosine of gradients at timesteps far apart.
        average: by the mean of a run's snapshots, where they were given.
    """

    timesteps: list[int]
    trained: Tensor
    held_out: Tensor
    gap: Change
    steps: int
    rates: list[float]
    longer: list[Change]
    longer_trained: list[Change]
    copies: list[Change]
    density_rate: float
    density: Change
    density_plain: Change
    gradients: GradientSimilarity
    far: Change
    prospects: list[Prospect]
    verdicts: Verdicts
    free: list[FreeWin] = field(default_factory=list)
    average: Change | None = None

    @property
    def best_rate(self) -> float:
        """The one with the least held-out loss."""
        return self.rates[min(range(len(self.rates)), key=lambda place: self.longer[place].mean)]

    @property
    def gaps(self) -> list[Change]:
        """The gap at each timestep."""
        rows = zip(self.trained.split(1), self.held_out.split(1), strict=True)
        return [change(trained, held_out) for trained, held_out in rows]

    def numbers(self) -> dict[str, Any]:
        """For JSON; docs/diagnosing.md lists the keys."""
        near, *_ = near_and_far(self.gradients.corrected)
        by_rate = zip(self.rates, self.longer, self.longer_trained, self.copies, strict=True)
        plain = as_plain(
            {
                "version": _VERSION,
                "verdicts": asdict(self.verdicts),
                "losses": {
                    "timesteps": self.timesteps,
                    "training_images": curve(self.trained),
                    "held_out_images": curve(self.held_out),
                    "gap": asdict(self.gap),
                    "gaps": [asdict(each) for each in self.gaps],
                },
                "trainings": {
                    "steps": self.steps,
                    "rates": [
                        {
                            "learning_rate": rate,
                            "held_out_change": asdict(longer),
                            "training_change": asdict(trained),
                            "copies_by_range_change": asdict(copies),
                        }
                        for rate, longer, trained, copies in by_rate
                    ],
                    "other_density": {
                        "learning_rate": self.density_rate,
                        "weighted_change": asdict(self.density),
                        "held_out_change": asdict(self.density_plain),
                    },
                },
                "gradients": {
                    "cosine": self.gradients.cosine,
                    "corrected": self.gradients.corrected,
                    "reliability": self.gradients.reliability,
                    "far": asdict(self.far),
                    "neighbours": near,
                },
                "methods": [asdict(each) for each in self.prospects],
                "free": [asdict(each) for each in self.free],
                "average_of_snapshots": None if self.average is None else asdict(self.average),
            }
        )
        return dict(plain)


def curve(losses: Tensor) -> dict[str, list[float]]:
    """Mean and standard error of each row."""
    found = [estimate(row) for row in losses.split(1)]
    return {"mean": [each.mean for each in found], "error": [each.error for each in found]}


def diagnose(
    config: DiagnoseConfig,
    model: nn.Module,
    objective: Objective,
    dataset: Any,
    held_out: Any,
    on_part: Callable[[str], object] = lambda name: None,
) -> Diagnosis:
    """Measure a model on its own training images and on others.

    Args:
        model: on its device; it stays as it is.
        dataset, held_out: items as `training.draws.draw` takes them.
        on_part: called with a name before each part.

    Raises:
        UserError: choices that cannot be, or images that do not fit the model.
    """
    _check(config)
    timesteps = even_timesteps(objective.num_train_timesteps, config.timesteps)
    on_part("losses on training and on held-out images")
    trained, others = (_samples(config, each, timesteps, config.images) for each in (dataset, held_out))
    own, other = (loss_at_timesteps(model, objective, samples) for samples in (trained, others))
    fewer = min(own.shape[1], other.shape[1])
    gap = change(own[:, :fewer], other[:, :fewer])
    on_part("gradients")
    gradients = _gradients(config, model, objective, dataset, timesteps)
    flip = config.data.horizontal_flip
    prospects = measure_prospects(
        model, objective, dataset, config.batch_size, flip, lambda name: on_part(f"steps of {name}")
    )
    tried_on = [_samples(config, each, timesteps, min(config.images, _TRIED_ON)) for each in (held_out, dataset)]
    steps = config.steps or _steps(config, prospects[0])
    on_part(f"trainings of {steps} steps")
    trials = Trials(
        model, objective, dataset, tried_on[0], tried_on[1], steps, config.batch_size, config.seed, on_part
    )
    before = [loss_at_timesteps(model, objective, samples) for samples in tried_on]
    longer = [trials.longer(rate) for rate in config.rates]
    copies = [trials.by_range(rate) for rate in config.rates]
    least = min([before[0], *(trial.held_out for trial in longer)], key=lambda losses: float(losses.mean()))
    count, least_rate = len(config.rates), _least(longer).learning_rate
    by_density, weights = trials.other_density(least_rate), density_at(objective, timesteps)
    changes = [change(before[0], trial.held_out, comparisons=count) for trial in longer]
    by_training = [change(before[1], trial.trained, comparisons=count) for trial in longer]
    by_copies = [change(least, trial.held_out, comparisons=count) for trial in copies]
    density = change(before[0], by_density.held_out, weights)
    far = far_cosine(gradients)
    return Diagnosis(
        timesteps,
        own,
        other,
        gap,
        steps,
        list(config.rates),
        changes,
        by_training,
        by_copies,
        least_rate,
        density,
        change(before[0], by_density.held_out),
        gradients,
        far,
        prospects,
        judge(gap, changes, by_training, density, by_copies, how_stages_agree(far)),
    )


def _check(config: DiagnoseConfig) -> None:
    if not config.rates or min(config.rates) <= 0.0:
        raise UserError(f"rates={config.rates} must be learning rates above 0, one or more.")
    for name, least in (("images", 2), ("batch_size", 1), ("steps", 0), ("samples", 0), ("seed", 0), ("minutes", 0)):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)} must be at least {least}.")


def _samples(config: DiagnoseConfig, dataset: Any, timesteps: Sequence[int], most: int) -> Samples:
    """As many images as there are, at most `most`: the same at every timestep."""
    count, flip = min(most, len(dataset)), config.data.horizontal_flip
    return Samples(dataset, timesteps, count, 64, config.seed, flip, config.data.num_workers, same_images=True)


def _least(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: float(trial.held_out.mean()))


def _gradients(
    config: DiagnoseConfig, model: nn.Module, objective: Objective, dataset: Any, timesteps: Sequence[int]
) -> GradientSimilarity:
    """Whole, or projected where they would take much memory."""
    count = min(_GRADIENT_SAMPLES, 2 * config.images) // 2 * 2
    samples = Samples(dataset, timesteps, count, config.batch_size, config.seed, config.data.horizontal_flip)
    numbers = 2 * len(timesteps) * sum(value.numel() for value in model.parameters())
    return gradient_similarity(model, objective, samples, projection=_PROJECTION if numbers > _WHOLE_GRADIENTS else 0)


def _steps(config: DiagnoseConfig, finetuning: Prospect) -> int:
    """As many as the time is enough for, of two trainings a rate and one more."""
    if math.isnan(finetuning.seconds):
        raise UserError(f"All weights cannot be trained here, which a diagnosis tries: {finetuning.refused}.")
    seconds = 60.0 * config.minutes / (2 * len(config.rates) + 1)
    return int(min(_MOST_STEPS, max(_FEWEST_STEPS, seconds / finetuning.seconds)))
