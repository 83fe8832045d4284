"""What kinds of patch do on digits: each trained for the demo's budget, measured against the base, paired by seed.

    python experiments/digits_patches.py [--only NAME ...] [--output runs/digits-patches]

Tuned on sampling seeds 0 to 2; the demo reports on others. Finished entries are kept and reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli.demo import demo_plan
from stagepatch.core.files import write_json, write_text
from stagepatch.data import DataConfig
from stagepatch.diffusion import Objective
from stagepatch.evaluation import Evaluator, paired_difference
from stagepatch.families import learns_sigma
from stagepatch.methods import DMP
from stagepatch.patch import PatchConfig
from stagepatch.report import markdown_table
from stagepatch.training import train

SEEDS = [0, 1, 2]
BALANCE_OFF = {"importance_weight": 0.0, "load_weight": 0.0}
# name: patch's config, training's changes from the demo's
ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper's recipe: 1e-4, constant, no average": (
        {},
        {"learning_rate": 1e-4, "lr_scheduler": "constant", "ema_decay": 0.0},
    ),
    "1e-3": ({}, {"learning_rate": 1e-3}),
    "1e-2": ({}, {"learning_rate": 1e-2}),
    "3e-2": ({}, {"learning_rate": 3e-2}),
    "1e-2, no balance losses": (BALANCE_OFF, {"learning_rate": 1e-2}),
    "1e-2, balance (1, 0)": ({"load_weight": 0.0}, {"learning_rate": 1e-2}),
    "1e-2, first half of the blocks": ({"sites": "half"}, {"learning_rate": 1e-2}),
    "1e-2, first block": ({"sites": "first"}, {"learning_rate": 1e-2}),
    "1e-2, 6,000 steps": ({}, {"learning_rate": 1e-2, "steps": 6000}),
    "1e-2, gate sees t+c": ({"condition": "t+c"}, {"learning_rate": 1e-2}),
    "K = 4 sets, 1e-3": ({"num_experts": 4}, {"learning_rate": 1e-3}),
    "K = 4 sets, 3e-3": ({"num_experts": 4}, {"learning_rate": 3e-3}),
    "prompt tuning, 6e-4": ({"gate": "none"}, {"learning_rate": 6e-4}),
    "released preset, 1e-3": ({"preset": "released"}, {"learning_rate": 1e-3}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(ENTRIES))
    parser.add_argument("--output", type=Path, default=Path("runs/digits-patches"))
    arguments = parser.parse_args()
    training, sampling = demo_plan(quick=False)
    evaluator = Evaluator.load("digits", DataConfig(), "digits", Path("cache"))

    def metrics_of(name: str) -> dict[str, list[float]]:
        directory = arguments.output / "".join(letter if letter.isalnum() else "-" for letter in name)
        kept = directory / "metrics.json"
        if not kept.exists():
            model, scheduler = load_denoiser("digits")
            if name != "base":
                options, changes = ENTRIES[name]
                method = DMP(PatchConfig(**options))
                objective = Objective(scheduler, learns_sigma(model))
                train(model, method, objective, evaluator.references.train, replace(training, **changes), directory)
                method.patch.eval()
            result = evaluator.measure(model, scheduler, sampling, SEEDS)
            write_json(kept, {key: result.values(key) for key in result.metrics[0]})
        return json.loads(kept.read_text())

    base = metrics_of("base")
    rows = [["base", *(f"{statistics.fmean(base[key]):.4f}" for key in ("fid_train", "fid_held_out")), "", ""]]
    for name in arguments.only:
        values = metrics_of(name)
        row = [name, *(f"{statistics.fmean(values[key]):.4f}" for key in ("fid_train", "fid_held_out"))]
        for key in ("fid_train", "fid_held_out"):
            mean, error = paired_difference(base[key], values[key])
            row.append(f"{mean:+.4f} ± {error:.4f}")
        rows.append(row)
        print(row, flush=True)
    columns = ["patch", "FID, training", "FID, held-out", "change, training", "change, held-out"]
    write_text(arguments.output / "table.md", markdown_table(columns, rows))


if __name__ == "__main__":
    main()
