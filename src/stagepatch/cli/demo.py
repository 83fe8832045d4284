"""The demo: patch the bundled digits model, compare with the base from the same noise, report."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from stagepatch import report
from stagepatch.analysis import gate_activation, plot_gate_activation
from stagepatch.cli import config as configs
from stagepatch.cli.common import bar_over
from stagepatch.core import write_json, write_tensors, write_text
from stagepatch.evaluation import METRICS, Evaluator, Measured, comparison_table, direction_note, paired_difference
from stagepatch.sampling import SamplingConfig
from stagepatch.training import RUN_CONFIG, Run, TrainConfig, TrainingConfig, read_log

SEEDS = [100, 101, 102]


def demo_plan(quick: bool) -> tuple[TrainingConfig, SamplingConfig]:
    """Training of the patch, and sampling with each of SEEDS: the full demo, or the one of under a minute."""
    training = TrainingConfig(
        steps=2000,
        batch_size=128,
        learning_rate=1e-2,
        lr_scheduler="linear",
        ema_decay=0.999,
        log_every=20,
        checkpoint_every=250,
        tensorboard=False,
    )
    sampling = SamplingConfig(scheduler="ddim", num_inference_steps=20, num_images=3000, batch_size=500)
    if quick:
        return replace(training, steps=150, ema_decay=0.98), replace(sampling, num_images=500)
    return training, sampling


def demo(config: configs.DemoConfig, resolved: str) -> None:
    """Train, sample, measure and report; everything lands in the output directory."""
    directory, quick = Path(config.output_dir), config.quick
    training, sampling = demo_plan(quick)
    title = "stagepatch demo" + (" (quick: too short to judge by)" if quick else "")
    console = Console()
    run = Run(TrainConfig(output_dir=str(directory / f"training{'-quick' * quick}"), training=training))
    evaluator = Evaluator.load("digits", run.config.data, "digits", directory)

    console.print(f"[bold]1/3[/] Training a DMP patch on {len(run.dataset)} digits; the model is frozen.")
    patch = run.train().patch.eval()
    patch.save_pretrained(directory)
    write_text(directory / RUN_CONFIG, run.config_text)

    console.print(f"[bold]2/3[/] Sampling base and patched model from the same noise, seeds {SEEDS}.")
    measured: dict[str, Measured] = {}
    with bar_over(2 * len(SEEDS) * sampling.num_images) as on_batch:
        for name in ("base", "patched"):
            patch.enabled = name == "patched"
            measured[name] = evaluator.measure(run.model, run.scheduler, sampling, SEEDS, on_batch)
    base, patched = measured["base"], measured["patched"]
    write_tensors(directory / "samples.safetensors", {name: value.images for name, value in measured.items()})
    write_json(directory / "metrics.json", {name: value.metrics for name, value in measured.items()})

    console.print("[bold]3/3[/] Writing the report.")
    timesteps = torch.arange(0, run.objective.num_train_timesteps, 10)
    activation = gate_activation(run.model, patch, timesteps)
    columns, rows = comparison_table(base, patched, evaluator.extractor.name)
    pairs = report.paired_grid(base.images[:40], patched.images[:40], columns=10)
    report.write_picture(directory / "pairs.png", pairs)
    facts = {
        "base parameters": f"{sum(value.numel() for value in run.model.parameters()):,}",
        "patch parameters": f"{patch.num_parameters():,}",
        "training": f"{training.steps} steps of {training.batch_size}",
        "sampling": f"{sampling.num_images} images a seed, {sampling.num_inference_steps} DDIM steps",
    }
    sections: list[report.Section] = [
        report.Table("What the patch changed", columns, rows, _NOTE),
        report.Prose("Verdict", verdict(base, patched, quick)),
        report.Picture("Samples", pairs, "Base and patched model from the same noise."),
        report.Picture("Training", report.training_curves(read_log(run.directory)), "Loss, balance terms and gate."),
        report.Picture(
            "Gate activation",
            plot_gate_activation(activation, timesteps, [site.name for site in patch.backbone.sites]),
            "Weight of every prompt over timesteps, a panel a block (as in Fig. 5 of the paper).",
        ),
        report.KeyValues("In numbers", facts),
        *report.provenance(run.config_text, _commands(directory, quick)),
    ]
    report.write_page(directory / "report.html", title, _LEAD, sections)
    report.print_table(columns, rows, title)
    console.print(verdict(base, patched, quick), highlight=False)
    console.print(f"Report: {directory / 'report.html'}", highlight=False, soft_wrap=True)


_LEAD = (
    "A converged DiT for scikit-learn's digits, frozen, and a patch of prompts mixed by timestep (DMP, arXiv "
    "2405.17825), trained on the same digits. A third of the digits is held out from all training."
)
_NOTE = (
    "Mean ± standard deviation over sampling seeds; the difference is paired by seed, ± its standard error. "
    f"{direction_note(METRICS)}"
)


def verdict(base: Measured, patched: Measured, quick: bool) -> str:
    """One sentence on whether the patch helped against the held-out digits."""
    before = sum(base.values("fid_held_out")) / len(base.metrics)
    mean, error = paired_difference(base.values("fid_held_out"), patched.values("fid_held_out"))
    change = f"{mean:+.4f} ± {error:.4f} ({100 * mean / before:+.1f} %)"
    outcome = "The patch gains" if mean < 0 else "The patch does not gain"
    if abs(mean) <= 2 * error:
        outcome = "No gain to be told from noise"
    result = f"{outcome}: FID (digits features) against held-out digits changes by {change}."
    return result + (" This was the quick form, too short to judge by." if quick else "")


def _commands(directory: Path, quick: bool) -> str:
    demo = "stagepatch demo" + (" --quick" if quick else "") + f" --output_dir {directory}"
    evaluate = f"stagepatch evaluate --model digits --patch {directory} --seeds '{SEEDS}'"
    return f"{demo}\n{evaluate}\nstagepatch inspect {directory}\n"
