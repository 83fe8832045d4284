"""Is the bundled digits model converged? FID over its pretraining, and of all its weights trained further.

    python experiments/convergence.py [--run runs/digits-dit] [--output docs/convergence]

Needs the snapshots of `stagepatch pretrain --config configs/digits/pretrain.yaml`. Fine-tunes the final model with
EMA and a rate that decays to zero, for the demo's budget, at several rates and training seeds, and measures all
against the training digits and against the third that nothing trains on. Finished fine-tunings are kept and reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli.demo import demo_plan
from stagepatch.core.files import write_atomically, write_json, write_text
from stagepatch.data import DataConfig
from stagepatch.diffusion import Objective
from stagepatch.evaluation import Evaluator, paired_difference
from stagepatch.families import learns_sigma
from stagepatch.methods import Finetune
from stagepatch.report import markdown_table, metric_curves
from stagepatch.training import train

SEEDS = [0, 1, 2]
TRAINING, SAMPLING = demo_plan(quick=False)
RATES = [1e-4, 3e-4, 1e-3]
TRAINING_SEEDS = [0, 1]
METRICS = {"fid_train": "training digits", "fid_held_out": "held-out digits"}


def measured(directory: Path, evaluator: Evaluator) -> dict[str, list[float]]:
    """Metrics of a model directory by seed, kept beside it."""
    kept = directory / "convergence.json"
    if not kept.exists():
        model, scheduler = load_denoiser(directory)
        result = evaluator.measure(model, scheduler, SAMPLING, SEEDS)
        names = [*METRICS, "nearest_train"]
        write_json(kept, {name: result.values(name) for name in names})
    return json.loads(kept.read_text())


def finetuned(base: Path, rate: float, seed: int, evaluator: Evaluator) -> Path:
    """The base with all its weights trained for the demo's budget."""
    directory = base / "finetuned" / f"{rate:g}-{seed}"
    if not (directory / "transformer").exists():
        model, scheduler = load_denoiser(base)
        training = replace(TRAINING, learning_rate=rate, seed=1000 + seed)
        objective = Objective(scheduler, learns_sigma(model))
        train(model, Finetune(scheduler), objective, evaluator.references.train, training, directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/digits-dit"))
    parser.add_argument("--output", type=Path, default=Path("docs/convergence"))
    arguments = parser.parse_args()
    evaluator = Evaluator.load("digits", DataConfig(), "digits", Path("cache"))

    snapshots = sorted((arguments.run / "snapshots").iterdir())
    series: dict[str, list[tuple[int, float]]] = {label: [] for label in METRICS.values()}
    for snapshot in snapshots:
        values = measured(snapshot, evaluator)
        for name, label in METRICS.items():
            series[label].append((int(snapshot.name), statistics.fmean(values[name])))
        print(snapshot.name, {name: round(statistics.fmean(value), 4) for name, value in values.items()}, flush=True)

    base = measured(arguments.run, evaluator)
    rows = [["base", "", *(f"{statistics.fmean(base[name]):.4f}" for name in [*METRICS, "nearest_train"]), ""]]
    for rate in RATES:
        for seed in TRAINING_SEEDS:
            values = measured(finetuned(arguments.run, rate, seed, evaluator), evaluator)
            mean, error = paired_difference(base["fid_held_out"], values["fid_held_out"])
            numbers = [f"{statistics.fmean(values[name]):.4f}" for name in [*METRICS, "nearest_train"]]
            rows.append([f"fine-tuned at {rate:g}", str(seed), *numbers, f"{mean:+.4f} ± {error:.4f}"])
            print(rows[-1], flush=True)
    columns = [
        "model",
        "training seed",
        "FID, training",
        "FID, held-out",
        "nearest training image",
        "change, held-out",
    ]
    write_text(arguments.run / "convergence.md", markdown_table(columns, rows))
    figure = metric_curves(series, "FID (digits features)")
    write_atomically(arguments.output.with_suffix(".png"), lambda path: figure.savefig(path, format="png", dpi=150))


if __name__ == "__main__":
    main()
