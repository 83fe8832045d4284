"""What costs no training: other samplers, more steps, guidance in an interval, a mean of snapshots."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stagepatch import merging
from stagepatch.analysis.changes import Change, change
from stagepatch.analysis.losses import load_other, loss_at_timesteps
from stagepatch.analysis.samples import Samples
from stagepatch.analysis.snapshots import find_snapshots
from stagepatch.core import UserError
from stagepatch.data import DataConfig
from stagepatch.diffusion import Objective, sampler_fits
from stagepatch.evaluation import Evaluator, of_units
from stagepatch.families import num_classes
from stagepatch.methods import open_artifact
from stagepatch.sampling import SamplingConfig, sampled_as_trained

STEPS = 25
_SEEDS = (0, 1, 2)
_FID = "fid_held_out"


@dataclass
class FreeWin:
    """A way to sample the model.

    Args:
        calls: of the model, a sample.
        fid: against held-out images, mean over sampling seeds.
        change: of FID to the first way's, paired by seed.
        options: of `stagepatch sample`.
    """

    label: str
    calls: float
    fid: float
    change: Change
    options: str


def ways_to_sample(has_classes: bool, scheduler: Any) -> dict[str, tuple[SamplingConfig, float, str]]:
    """Samplers by name, with the calls of the model that a sample takes, and the options that ask for each.

    Args:
        scheduler: the one that the model was trained with; what does not fit it is left out.
    """
    base = SamplingConfig(num_inference_steps=STEPS)
    steps = f"--sampling.num_inference_steps {STEPS}"
    ways = {
        f"{STEPS} steps": (base, float(STEPS), steps),
        f"{2 * STEPS} steps": (
            replace(base, num_inference_steps=2 * STEPS),
            2.0 * STEPS,
            f"--sampling.num_inference_steps {2 * STEPS}",
        ),
        f"DPM-Solver++, {STEPS} steps": (
            replace(base, scheduler="dpmsolver++"),
            float(STEPS),
            f"--sampling.scheduler dpmsolver++ {steps}",
        ),
    }
    spaced = getattr(scheduler.config, "timestep_spacing", "trailing")
    if spaced != "trailing":
        trailing = replace(base, timestep_spacing="trailing")
        ways[f"{STEPS} steps, trailing"] = (trailing, float(STEPS), f"--sampling.timestep_spacing trailing {steps}")
    ways[f"DDPM, {2 * STEPS} steps"] = (
        replace(base, scheduler="ddpm", num_inference_steps=2 * STEPS),
        2.0 * STEPS,
        f"--sampling.scheduler ddpm --sampling.num_inference_steps {2 * STEPS}",
    )
    if has_classes:
        for scale, (low, high) in ((1.2, (0.0, 1.0)), (1.3, (0.0, 0.5))):
            interval = [low, high]
            guided = replace(base, guidance_scale=scale, guidance_interval=interval)
            options = f"{steps} --sampling.guidance_scale {scale:g} --sampling.guidance_interval '[{low:g}, {high:g}]'"
            ways[f"guidance {scale:g}, noise {low:g} to {high:g}"] = (guided, STEPS * (1.0 + high - low), options)
    fitting = {}
    for label, (sampling, calls, options) in ways.items():
        own = sampled_as_trained(sampling, scheduler)
        if sampler_fits(own.scheduler, scheduler, own.timestep_spacing):
            fitting[label] = (own, calls, options)
    return fitting


def measure_free(
    model: nn.Module,
    scheduler: Any,
    name: str,
    data: DataConfig,
    images: int,
    cache: Path,
    on_way: Callable[[str], object] = lambda label: None,
) -> list[FreeWin]:
    """FID of each way to sample, from the same noise, over three seeds; of a model of bundled data.

    Raises:
        UserError: see `Evaluator.load`.
    """
    held_out: Literal["held_out", "tune"] = "held_out" if data.source == "digits" else "tune"
    evaluator = Evaluator.load(name, data, data.source, cache, held_out, metrics=[_FID])
    found: list[FreeWin] = []
    base: list[float] = []
    for label, (sampling, calls, options) in ways_to_sample(bool(num_classes(model)), scheduler).items():
        on_way(label)
        sampling = replace(sampling, num_images=images, batch_size=min(images, sampling.batch_size))
        fids = evaluator.measure(model, scheduler, sampling, _SEEDS).values(_FID)
        base = base or fids
        over_seeds = of_units([other / one - 1.0 for one, other in zip(base, fids, strict=True)])
        changed = Change(over_seeds.mean, *over_seeds.interval)
        found.append(FreeWin(label, calls, sum(fids) / len(fids), changed, options))
    return found


def weights_of_mean(run: Path) -> list[float]:
    """Of a run's snapshots for `stagepatch merge --run`, which give the mean of their later half.

    A snapshot of the last step is the run's result, which has what is left by the others.
    """
    count = len(find_snapshots(run))
    later = count - count // 2
    weights = [0.0] * (count // 2) + [1.0 / later] * later
    return weights[: len(merging.find_snapshots(run).directories)]


def measure_average(model: str, run: Path, base: nn.Module, objective: Objective, samples: Samples) -> Change:
    """What the plain mean of the later half of a run's snapshots does to the held-out loss.

    Raises:
        UserError: no snapshots, or some of what is no model and no weights.
    """
    paths = list(find_snapshots(run).values())
    paths = paths[len(paths) // 2 :]
    if (kind := open_artifact(paths[-1]).kind) not in ("model", "weights"):
        raise UserError(f"'{run}' keeps snapshots of {kind}; their mean is taken of models and weights alone.")
    mean = copy.deepcopy(base)
    sums = {name: torch.zeros_like(value) for name, value in mean.named_parameters()}
    for path in paths:
        for name, value in load_other(model, path, objective).named_parameters():
            sums[name] += value.detach() / len(paths)
    with torch.no_grad():
        for name, value in mean.named_parameters():
            value.copy_(sums[name])
    return change(loss_at_timesteps(base, objective, samples), loss_at_timesteps(mean, objective, samples))
