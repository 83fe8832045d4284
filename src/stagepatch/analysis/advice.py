"""What to do about a diagnosis, each with its command, ordered by worth."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from stagepatch.analysis.config import DiagnoseConfig
from stagepatch.analysis.diagnosis import Diagnosis
from stagepatch.analysis.free import weights_of_mean
from stagepatch.data import BUNDLED, DataConfig

MEASURED, BENCH, UNMEASURED = "measured here", "measured on the fashion bench, not on your model", "not measured"
_FAKES = 30_000
_RECOMMENDED_STEPS = 400


@dataclass
class Advice:
    """One thing to do.

    Args:
        key: the same in every diagnosis.
        why: what was found, and what it can be expected to give.
        evidence: where the expectation comes from.
        command: that does it; empty where none does.
    """

    key: str
    title: str
    why: str
    evidence: str
    command: str = ""


def give_advice(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    """First the cure of what limits the model; then what was measured to gain, what costs nothing first; then what
    gained on the bench; then what was not measured; last, what not to expect."""
    return [
        *_cure(config, found),
        *_density(config, found),
        *_measured_free(config, found),
        *_by_another_objective(config, found),
        *_unmeasured_free(config, found),
        *_not_to_expect(found),
    ]


def _options(config: DiagnoseConfig) -> str:
    """The model and its data, as `train` takes them."""
    data, plain = config.data, DataConfig()
    options = f"--model {shlex.quote(config.model)} --data.source {shlex.quote(data.source)}"
    for name in ("image_size", "horizontal_flip", "held_out", "format"):
        if getattr(data, name) != getattr(plain, name):
            options += f" --data.{name}={str(getattr(data, name)).lower()}"
    return options


def _finetune(config: DiagnoseConfig, rate: float, steps: int) -> str:
    watched = " --validation.loss_every=200" if config.data.source in BUNDLED or config.data.held_out else ""
    return (
        f"stagepatch train {_options(config)} --method finetune --training.steps={steps} "
        f"--training.batch_size={config.batch_size} --training.learning_rate={rate:g} "
        f"--training.lr_scheduler=linear --training.ema_decay=0.999{watched} --output_dir runs/longer"
    )


def _experts(data: str) -> str:
    return f"stagepatch decouple --preset=experts {data}"


def _cure(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    limit, rate, data = found.verdicts.limited_by, found.best_rate, _options(config)
    if limit == "training":
        best = min(found.longer, key=lambda each: each.mean)
        why = (
            f"{found.steps} averaged steps at {rate:g} change the held-out loss by {best}: more of them will give "
            f"more. Every other method would first give what this gives."
        )
        command = _finetune(config, rate, max(1000, 20 * found.steps))
        return [Advice("train_longer", "Train the model on before you patch it", why, MEASURED, command)]
    if limit == "data":
        why = (
            f"The loss on held-out images is {found.gap} above that on training images: so much, at the most, is to "
            f"be had from more images, from mirrored ones where that fits, or from an earlier snapshot. A patch that "
            f"learns by the denoising loss from these images would widen the gap. The command shows which snapshot of "
            f"its run has the least held-out loss."
        )
        command = f"stagepatch analyze {data} --gradients=false --learned='[\"RUN/snapshots/0010000\"]'"
        return [Advice("more_data", "More images, or an earlier snapshot", why, MEASURED, command)]
    if limit == "capacity":
        best = min(found.copies, key=lambda each: each.mean)
        why = (
            f"Four copies, each trained on a quarter of the timesteps, change the held-out loss by {best} to the "
            f"least that one model has: for this budget, the most that weights by stage can give. Copies that are "
            f"sampled by range give all of it (on the fashion bench FID −14.2 ± 0.5 %)."
        )
        copies = f"{_experts(data)} --training.learning_rate={rate:g}"
        maps = f"stagepatch train --preset=stages {data} --training.learning_rate={3 * rate:g}"
        one_file = (
            "Four maps of rank 8 a layer, in one file and at the model's own calls: FID −10.7 ± 0.8 % after 8,000 "
            "steps of 128, where one LoRA of as many parameters gained nothing."
        )
        return [
            Advice("copies_by_range", "A copy for each range of timesteps", why, MEASURED, copies),
            Advice("stage_lora", "Low-rank maps, mixed over the timesteps", one_file, BENCH, maps),
        ]
    if limit == "unclear":
        why = "Intervals are over images, of which four times as many halve them; longer trainings tell more."
        command = f"stagepatch diagnose {data} --images={4 * config.images} --minutes={4 * config.minutes:g}"
        return [Advice("diagnose_longer", "Diagnose for longer, on more images", why, MEASURED, command)]
    return []


def _density(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    if found.verdicts.converged_other_density != "no" or found.verdicts.limited_by in ("training", "data"):
        return []
    why = (
        f"For the loss that weighs high noise more, the model is not converged: {found.steps} steps with t "
        f"logit-normal, mean 1, change it by {found.density} (timesteps alike: {found.density_plain}). On the fashion "
        f"bench this gave −4.7 ± 0.7 % of FID."
    )
    command = (
        f"{_finetune(config, found.density_rate, 2000)} --timesteps.density=logit_normal --timesteps.logit_mean=1"
    )
    return [Advice("other_density", "Fine-tune with another density of timesteps", why, MEASURED, command)]


def _measured_free(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    advice = []
    for win in sorted(found.free[1:], key=lambda each: each.change.mean):
        if win.change.is_below(0.0) == "yes":
            why = (
                f"FID changes by {win.change}, over three sampling seeds of {config.samples} images, at {win.calls:g} "
                f"calls of the model a sample in place of {found.free[0].calls:g}; one of {len(found.free) - 1} ways "
                f"that were compared."
            )
            if "DDPM" in win.label:
                why += " Noise at each of few steps costs recall, which was not measured."
            command = f"stagepatch sample --model {shlex.quote(config.model)} {win.options}"
            advice.append(Advice("sampling", f"Sample with {win.label}", why, MEASURED, command))
    if found.average is not None and found.average.is_below(0.0) == "yes":
        why = f"The mean of the later half of the snapshots changes the held-out loss by {found.average}."
        weights = ", ".join(f"{weight:.6g}" for weight in weights_of_mean(Path(config.snapshots)))
        command = f"stagepatch merge --run {shlex.quote(config.snapshots)} --weights '[{weights}]'"
        advice.insert(0, Advice("average", "Average the snapshots", why, MEASURED, command))
    return advice


def _by_another_objective(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    if found.verdicts.limited_by == "training":
        return []
    ddo = next(each for each in found.prospects if each.key == "ddo")
    minutes = (_FAKES * ddo.sample_seconds + _RECOMMENDED_STEPS * ddo.seconds) / 60.0
    cost = f" Here that takes some {minutes:.0f} minutes, most of it for {_FAKES:,} samples of the model." * (
        ddo.seconds == ddo.seconds
    )
    data = _options(config)
    copies = Advice(
        "copies_by_range",
        "A copy for each range of timesteps",
        "Four copies, each fine-tuned on a quarter of the noise levels (2,000 steps of 128) and sampled in it: FID "
        "−14.2 ± 0.5 % at the model's own calls, for four sets of weights. One copy with all these steps gained "
        "nothing. Whether yours would gain could not be told.",
        BENCH,
        f"{_experts(data)} --output_dir runs/experts",
    )
    return [
        Advice(
            "guide",
            "A worse version of the model, to sample away from",
            "FID −40.6 ± 0.6 % at twice the calls of the model, four times what twice the steps gave.",
            BENCH,
            f"stagepatch train --preset guide {data} --output_dir runs/guide",
        ),
        *([copies] if found.verdicts.shares_too_little == "unclear" else []),
        Advice(
            "ddo",
            "Learn to tell training images from the model's samples (DDO)",
            "FID −12.0 ± 0.8 % at the model's own cost, by a sampler that draws no noise at each step; by DDPM "
            f"2 % (one training). It needs no room in the denoising loss.{cost}",
            BENCH,
            f"stagepatch train --preset recommended {data} --output_dir runs/patch",
        ),
    ]


def _unmeasured_free(config: DiagnoseConfig, found: Diagnosis) -> list[Advice]:
    advice = []
    if not found.free:
        why = (
            "More steps, another sampler, guidance in an interval of the noise levels: each may gain or lose. Measure."
        )
        extractor = f"--extractor {config.data.source if config.data.source in BUNDLED else 'inception'}"
        command = (
            f"stagepatch evaluate {_options(config)} {extractor} --sampling.num_inference_steps=50 "
            f"--sampling.guidance_scale=1.3 --sampling.guidance_interval='[0, 0.5]'"
        )
        advice.append(Advice("sampling", "Try other samplers", why, UNMEASURED, command))
    if found.average is None:
        why = (
            "The length of an average is worth a search, and costs nothing where the run kept averages "
            "(--training.posthoc_ema='[0.05, 0.1]' --training.snapshot_every=N)."
        )
        command = "stagepatch merge --run RUN --posthoc_ema 0.15"
        advice.append(Advice("average", "A longer average", why, UNMEASURED, command))
    return advice


def _not_to_expect(found: Diagnosis) -> list[Advice]:
    verdicts = found.verdicts
    if verdicts.limited_by == "capacity" or verdicts.shares_too_little != "no":
        return []
    why = (
        f"Weights of their own for each quarter of the timesteps did not lower the held-out loss in {found.steps} "
        "steps, so prompts and small LoRAs that learn by the denoising loss have little room to gain in so few. On "
        "the fashion bench DMP gave −0.1 ± 0.1 % of FID and LoRA +0.6 ± 1.3 %. Four copies gained there, in 2,000 "
        "steps each."
    )
    return [Advice("no_stages", "Do not expect prompts or LoRAs to gain by the denoising loss", why, MEASURED)]
