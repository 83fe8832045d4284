"""Small runs one after the other in one process: memory, open files and threads after each, as a table and a plot.

python experiments/soak.py --minutes 120 --output_dir runs/soak
"""

import argparse
import contextlib
import csv
import gc
import io
import os
import shutil
import time
from itertools import count, cycle
from pathlib import Path

import torch
from matplotlib.figure import Figure

from stagepatch.cli import main
from stagepatch.report import write_picture

_MODEL = ["--model.sample_size=8", "--model.in_channels=1", "--model.hidden_size=32", "--model.num_layers=2"]
_MODEL += ["--model.num_attention_heads=2", "--model.num_classes=10"]
_TRAINING = [
    "--training.steps=20",
    "--training.batch_size=8",
    "--training.log_every=5",
    "--training.snapshot_every=10",
]
_SAMPLING = ["--sampling.num_inference_steps=5", "--sampling.num_images=64"]
COLUMNS = ["run", "seconds", "command", "resident_mib", "open_files", "threads"]


def commands(model: Path, work: Path) -> list[list[str]]:
    """What is run in turn; each finds what those before it left."""
    base = f"--model={model}"
    out = {name: f"--output_dir={work / name}" for name in ("dmp", "lora", "sample", "measure")}
    decoupled = ["--num_stages=2", "--launch.executor=debug", f"--output_dir={work / 'stages'}"]
    return [
        ["train", base, out["dmp"], *_TRAINING, "--training.report_every=0.01", "--validation.loss_every=10"],
        ["train", base, out["lora"], "--method=lora", "--training.ema_decay=0.9", "--data.num_workers=1", *_TRAINING],
        ["sample", base, out["sample"], f"--patch={work / 'dmp'}", *_SAMPLING],
        ["evaluate", base, out["measure"], f"--patch={work / 'lora'}", "--seeds=[0]", *_SAMPLING],
        ["decouple", base, *decoupled, "--training.steps=5", "--training.batch_size=8"],
        ["merge", f"--stages=[{work / 'stages'}]", "--weights=[0.5,0.5]", f"--output_dir={work / 'merged'}"],
    ]


def usage() -> dict[str, float]:
    """Of this process: resident memory [MiB], open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return {"resident_mib": round(mib, 1), "open_files": files - 1, "threads": threads}  # not the listing's own


def plot(path: Path, rows: list[dict[str, float | str]]) -> None:
    """Each number over the minutes."""
    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, name in zip(axes, COLUMNS[3:], strict=True):
        axis.plot([float(row["seconds"]) / 60 for row in rows], [float(row[name]) for row in rows], linewidth=0.8)
        axis.set(ylabel=name.replace("_", " "), ylim=(0, None))
        axis.grid(alpha=0.25)
    axes[-1].set_xlabel("minutes")
    write_picture(path, figure)


def soak(minutes: float, output: Path) -> list[dict[str, float | str]]:
    """Run until the time is over; every row is written as it comes."""
    output.mkdir(parents=True, exist_ok=True)
    model, work, rows = output / "model", output / "work", []
    torch.set_num_threads(1)
    _run(["pretrain", f"--output_dir={model}", "--training.steps=1", "--training.batch_size=8", *_MODEL])
    since, turns = time.monotonic(), cycle(commands(model, work))
    with open(output / "soak.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for number in count(1):
            arguments = next(turns)
            if arguments[0] == "train" and "--method=lora" not in arguments:
                shutil.rmtree(work, ignore_errors=True)
            _run(arguments)
            gc.collect()
            row = {"run": number, "seconds": round(time.monotonic() - since, 1), "command": arguments[0], **usage()}
            rows.append(row)
            table.writerow(row)
            file.flush()
            if time.monotonic() - since > 60 * minutes:
                break
    plot(output / "soak.png", rows)
    return rows


def _run(arguments: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    if code:
        raise SystemExit(f"stagepatch {' '.join(arguments)} ended with {code}:\n{said.getvalue()[-2000:]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    found = soak(given.minutes, given.output_dir)
    settled = found[len(found) // 4 :]  # libraries are loaded and caches filled by then
    for name in COLUMNS[3:]:
        values = [float(row[name]) for row in settled]
        print(f"{name}: {values[0]:g} after a quarter, {values[-1]:g} at the end, at most {max(values):g}")
