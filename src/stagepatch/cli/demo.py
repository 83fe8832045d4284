"""The demo: patch a bundled model, guide it by a worse version of itself, compare both with the base, and report."""

import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from stagepatch import report
from stagepatch.analysis import gate_activation, plot_gate_activation
from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import config as configs
from stagepatch.cli.common import bar_over
from stagepatch.core import write_json, write_tensors
from stagepatch.data import DataConfig
from stagepatch.evaluation import (
    Evaluator,
    Measured,
    change,
    chosen,
    comparison_note,
    comparison_table,
    direction_note,
)
from stagepatch.methods import DMP
from stagepatch.sampling import SamplingConfig, attach_guide
from stagepatch.training import Run, TrainConfig, TrainingConfig, apply_preset, read_log, write_run_config

SEEDS = [100, 101, 102]
METRIC = "fid_held_out"
GUIDED = "guided"
Row = dict[str, Measured]


@dataclass
class DemoPlan:
    """What a demo trains and samples.

    Args:
        train: the patch's training.
        sampling: of base and patched model, with each of SEEDS.
        more_steps: sampling steps of two further rows, base and patched: what anyone has without training.
        guide: training of a guide, which the base is sampled with in one more row: see `Guide`.
    """

    train: TrainConfig
    sampling: SamplingConfig
    more_steps: int = 0
    guide: TrainConfig | None = None


def demo_plan(data: str, quick: bool) -> DemoPlan:
    """The full demo, or the one of half a minute."""
    train = TrainConfig(model=data, data=DataConfig(source=data))
    if data == "digits":
        train.training = TrainingConfig(
            steps=2000, learning_rate=1e-2, lr_scheduler="linear", ema_decay=0.999, checkpoint_every=250
        )
        plan = DemoPlan(train, SamplingConfig(num_inference_steps=20, num_images=3000, batch_size=500))
    else:
        apply_preset(train, "recommended")
        train.ddo.sampling.num_images = 10_000
        guide = apply_preset(replace(train, ddo=deepcopy(train.ddo), training=TrainingConfig()), "guide")
        # The better base, at no cost (docs/evidence.md).
        sampling = SamplingConfig(num_inference_steps=25, timestep_spacing="trailing", num_images=2000, batch_size=500)
        plan = DemoPlan(train, sampling, 50, guide)
    for each in (train, plan.guide) if plan.guide else (train,):
        each.training = replace(each.training, log_every=20, tensorboard=False)
        if quick:
            each.training = replace(each.training, steps=each.training.steps // 10, ema_decay=0.98)
            each.ddo.sampling.num_images = 1000
    if quick:
        plan.sampling.num_images = 250
    return plan


def demo(config: configs.DemoConfig, resolved: str) -> None:
    """Train, sample, measure and report; everything lands in the output directory."""
    directory, console = Path(config.output_dir), Console()
    plan = demo_plan(config.data, config.quick)
    plan.train.output_dir = str(directory / f"training-{config.data}{'-quick' * config.quick}")
    run = Run(plan.train)
    console.print(f"[bold]1/3[/] Training a {run.method.kind} on {len(run.dataset)} images; the model is frozen.")
    _train(run, directory)
    if plan.guide:
        plan.guide.output_dir = f"{plan.train.output_dir}-guide"
        plan.guide.ddo.fakes = plan.guide.ddo.fakes or str(run.directory / "fakes")
        console.print("    And one that learns from the model's own samples: a worse model, to sample away from.")
        _train(Run(plan.guide), directory / "guide")

    models = "base, patched and guided model" if plan.guide else "base and patched model"
    console.print(f"[bold]2/3[/] Sampling {models} from the same noise, seeds {SEEDS}.")
    evaluator = Evaluator.load(config.data, run.config.data, config.data, directory)
    measured = _measure(run, plan, evaluator, directory)
    first = measured[plan.sampling.num_inference_steps]
    write_tensors(directory / "samples.safetensors", {name: value.images for name, value in first.items()})
    write_json(directory / "metrics.json", {name: value.metrics for name, value in first.items()})

    console.print("[bold]3/3[/] Writing the report.")
    title = "stagepatch demo" + (" (quick: too short to judge by)" if config.quick else "")
    report.write_page(
        directory / "report.html", title, _LEADS[config.data], _sections(run, plan, measured, evaluator, config)
    )
    report.print_table(*gain_table(measured), title)
    console.print(verdict(measured, config.quick), highlight=False)
    console.print(f"Report: {directory / 'report.html'}", highlight=False, soft_wrap=True)


def _train(run: Run, directory: Path) -> None:
    run.train()
    if isinstance(run.method, DMP):
        run.method.patch.eval()
    run.method.save(directory)
    write_run_config(directory, run.config_text)


def _measure(run: Run, plan: DemoPlan, evaluator: Evaluator, directory: Path) -> dict[int, Row]:
    """Base, patched and guided model by number of sampling steps."""
    models = {"base": load_denoiser(run.config.model)[0], "patched": run.model}
    rows = {plan.sampling.num_inference_steps: dict(models)}
    if plan.guide:
        guided, scheduler = load_denoiser(run.config.model)
        attach_guide(guided, scheduler, replace(plan.sampling, guide=str(directory / "guide")))
        rows[plan.sampling.num_inference_steps][GUIDED] = guided
    if plan.more_steps:
        rows[plan.more_steps] = models
    measured: dict[int, Row] = {}
    with bar_over(sum(map(len, rows.values())) * len(SEEDS) * plan.sampling.num_images) as on_batch:
        for count, row in rows.items():
            sampling = replace(plan.sampling, num_inference_steps=count)
            measured[count] = {
                name: evaluator.measure(model, run.scheduler, sampling, SEEDS, on_batch) for name, model in row.items()
            }
    return measured


def _sections(
    run: Run, plan: DemoPlan, measured: Mapping[int, Row], evaluator: Evaluator, config: configs.DemoConfig
) -> list[report.Section]:
    """The report; its pictures are kept as files too."""
    directory, training = Path(config.output_dir), plan.train.training
    first, figure = measured[plan.sampling.num_inference_steps], gain_figure(measured)
    pairs = report.paired_grid(first["base"].images[:40], first["patched"].images[:40], columns=10)
    report.write_picture(directory / "pairs.png", pairs)
    report.write_picture(directory / "gain.png", figure)
    whole = comparison_table(first["base"], first["patched"], evaluator.extractor.name)
    patch = run.method.patch if isinstance(run.method, DMP) else None
    trained = (patch or run.model).parameters()
    facts = {
        "trained parameters": f"{sum(value.numel() for value in trained if value.requires_grad):,}",
        "training": f"{training.steps} steps of {training.batch_size}, {plan.train.objective}",
        "sampling": f"{plan.sampling.num_images} images a seed, DDIM{_spacing(plan.sampling)}",
    }
    sections: list[report.Section] = [
        report.Prose("Verdict", verdict(measured, config.quick)),
        report.Table("What was gained", *gain_table(measured), _NOTE),
        report.Picture("Beside what costs no training", figure, _GAIN_CAPTION),
        _samples("Samples", first, "patched"),
        report.Table("All metrics", *whole, f"{comparison_note(first['base'])} {direction_note(chosen(None))}"),
        report.Picture("Training", report.training_curves(read_log(run.directory)), report.TRAINING_CAPTION),
    ]
    if GUIDED in first:
        guided = report.paired_grid(first["base"].images[:40], first[GUIDED].images[:40], columns=10)
        report.write_picture(directory / "guided.png", guided)
        sections.insert(4, _samples("Samples with the guide", first, GUIDED))
    if patch is not None:
        timesteps = torch.arange(0, run.objective.num_train_timesteps, 10)
        activation = gate_activation(run.model, patch, timesteps)
        plot = plot_gate_activation(activation, timesteps, [site.name for site in patch.backbone.sites])
        note = "Weight of every prompt over timesteps, a panel a block (as in Fig. 5 of arXiv 2405.17825)."
        sections.append(report.Picture("Gate activation", plot, note))
    again = report.provenance(run.config_text, _commands(directory, config, plan.sampling))
    return [*sections, report.KeyValues("In numbers", facts), *again]


def _spacing(sampling: SamplingConfig) -> str:
    return f", {sampling.timestep_spacing} timesteps" if sampling.timestep_spacing else ""


def _samples(title: str, row: Row, name: str) -> report.Comparison:
    caption = f"Equal places are from the same noise: the base left of the slider, {name} right of it."
    return report.Comparison.of_samples(title, row["base"].images, row[name].images, ("base", name), caption)


_LEADS = {
    "digits": (
        "A converged DiT for scikit-learn's digits, frozen, and a patch of prompts mixed by timestep (DMP, arXiv "
        "2405.17825), trained on the same digits. A third of the digits is held out from all training."
    ),
    "fashion": (
        "A converged DiT for Fashion-MNIST, frozen, and adapters that learned, from its own training images, to tell "
        "these from the model's samples (DDO, arXiv 2503.01103). 5,000 images are held out from all training."
    ),
}
_GAIN_CAPTION = (
    "Change of FID against held-out images, in percent of the first row's; below zero is better. Grey is the base in "
    "more steps. Lines: 95% intervals over sampling seeds, paired."
)
_NOTE = (
    "Mean ± standard deviation over sampling seeds; changes are paired by seed, with 95% intervals (Student's t). "
    f"{direction_note(chosen(None))}"
)


def gain_table(measured: Mapping[int, Row]) -> tuple[list[str], list[list[str]]]:
    """A row a model and number of steps: FID against held-out images, its change, recall."""
    base = next(iter(measured.values()))["base"]
    columns = ["model", "steps", "calls of the model", "FID, held-out images", "change to the first row", "recall"]
    rows = []
    for steps, row in measured.items():
        for name, value in row.items():
            fids, recalls = value.values(METRIC), value.values("recall")
            cells = [report.format_mean(statistics.fmean(own), statistics.stdev(own), 3) for own in (fids, recalls)]
            changed = "" if value is base else _percent(base, value)
            rows.append([name, str(steps), str(_calls(name, steps)), cells[0], changed, cells[1]])
    return columns, rows


def gain_figure(measured: Mapping[int, Row]) -> Figure:
    """The table's changes to its first row as bars, in percent, paired by seed."""
    base = next(iter(measured.values()))["base"]
    scale = 100.0 / statistics.fmean(base.values(METRIC))
    bars = [
        (f"{name}, {steps} steps, {_calls(name, steps)} calls", value)
        for steps, row in measured.items()
        for name, value in row.items()
    ][1:]
    figure = Figure(figsize=(6.5, 0.7 + 0.6 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, value) in enumerate(bars):
        found = change(base, value, METRIC)
        color = "tab:gray" if label.startswith("base") else "tab:green"
        axes.barh(place, scale * found.mean, xerr=scale * (found.interval[1] - found.mean), color=color, height=0.7)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    first = next(iter(measured))
    axes.set_xlabel(f"change of held-out FID, in percent of the base in {first} steps")
    axes.grid(axis="x", alpha=0.25)
    return figure


def verdict(measured: Mapping[int, Row], quick: bool) -> str:
    """Whether the patch helped against held-out images, and beside more sampling steps; and what a guide gives."""
    (steps, first), *others = measured.items()
    found = change(first["base"], first["patched"], METRIC)
    outcome = "The patch gains" if found.mean < 0 else "The patch does not gain"
    if found.interval[0] <= 0.0 <= found.interval[1]:
        outcome = "No gain to be told from noise"
    result = f"{outcome}: FID against held-out images changes by {_percent(first['base'], first['patched'])}."
    for more, row in others:
        without, both = (_percent(first["base"], row[name]) for name in ("base", "patched"))
        result += f" {more} sampling steps in place of {steps} give {without} without it, and {both} with it."
    if GUIDED in first:
        result += f" The base with its guide, at the cost of {_calls(GUIDED, steps)} steps: "
        result += f"{_percent(first['base'], first[GUIDED])}."
    return result + (" This was the quick form, too short to judge by." if quick else "")


def _calls(name: str, steps: int) -> int:
    return steps * (2 if name == GUIDED else 1)


def _percent(base: Measured, other: Measured) -> str:
    found, scale = change(base, other, METRIC), 100.0 / statistics.fmean(base.values(METRIC))
    return report.format_change(found.mean, found.interval, 1, scale, " %")


def _commands(directory: Path, config: configs.DemoConfig, sampling: SamplingConfig) -> str:
    demo = f"stagepatch demo --data {config.data}" + " --quick" * config.quick + f" --output_dir {directory}"
    own = f"--model {config.data} --data.source {config.data} --extractor {config.data} --seeds '{SEEDS}'"
    given = ("num_images", "num_inference_steps", "timestep_spacing", "batch_size")
    own += "".join(f" --sampling.{name} {value}" for name in given if (value := getattr(sampling, name)))
    evaluate = f"stagepatch evaluate {own} --patch {directory}"
    guided = "" if config.data == "digits" else f"\nstagepatch evaluate {own} --sampling.guide {directory}/guide"
    return f"{demo}\n{evaluate}{guided}\nstagepatch inspect {directory}\n"
