"""Merging four copies of a 114M-parameter U-Net: peak memory, and time over reading and writing the files once.

    python benchmarks/merge_memory.py [--rounds 3] [--mergekit]

Each merge is a process of its own; the baseline reads the same five files and writes one of their size, in
pieces, flushed to the disk as a merge is. With `--mergekit`, which is to be importable, its `mergekit-pytorch` merges
the same four files by the method linear in turns with ours; seconds of the processor and of the wall, imports apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from paired import Paired
from safetensors.torch import load_file

MERGE = """
import json, resource, sys, time
from pathlib import Path
from stagepatch.merging import merge_models
base, output, *stages = map(Path, sys.argv[1:])
start, cpu = time.perf_counter(), time.process_time()
merge_models(base, stages, [0.25] * len(stages), output)
seconds = [time.perf_counter() - start, time.process_time() - cpu]
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""

# The same weighted sum of the four stages, as the command `mergekit-pytorch` makes it.
MERGEKIT = """
import json, resource, sys, time
from mergekit.graph import Executor
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
_, output, *stages = sys.argv[1:]
start, cpu = time.perf_counter(), time.process_time()
files = [f"{stage}/unet/diffusion_pytorch_model.safetensors" for stage in stages]
models = [{"model": file, "parameters": {"weight": 0.25}} for file in files]
config = RawPyTorchMergeConfig(merge_method="linear", models=models)
tasks = plan_flat_merge(config, output, False, False, MergeOptions())
Executor(tasks, math_device="cpu", storage_device="cpu").execute()
seconds = [time.perf_counter() - start, time.process_time() - cpu]
print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def save_models(directory: Path) -> list[Path]:
    model = diffusers.UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )
    paths = [directory / name for name in ("base", "one", "two", "three", "four")]
    for path in paths:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(path)
    return paths


def read_and_write(paths: list[Path], output: Path) -> float:
    start = time.perf_counter()
    with open(output, "wb") as target:
        for number, path in enumerate(paths):
            with open(path / "unet" / "diffusion_pytorch_model.safetensors", "rb") as source:
                while piece := source.read(2**24):
                    if number == 0:
                        target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - start


def merge(script: str, paths: list[Path], output: Path) -> tuple[float, float, float]:
    """Seconds of the wall and of the processor, and peak MiB, of a merge in a process of its own."""
    command = [sys.executable, "-c", script, paths[0], output, *paths[1:]]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, env=environment)
    wall, cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu, peak


def compare(paths: list[Path], output: Path, rounds: int) -> None:
    """Ours over mergekit's."""
    both: list[list[tuple[float, float, float]]] = [[], []]
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            both[index].append(merge((MERGE, MERGEKIT)[index], paths, output))
            merged = [load_file(file) for file in sorted(output.rglob("*.safetensors"))]
            if number == 0:
                total = sum(value.double().abs().sum() for part in merged for value in part.values())
                print(f"{('ours', 'mergekit')[index]}: the merged weights' absolute sum is {total:.6f}", flush=True)
            shutil.rmtree(output)
    for place, name in enumerate(("time on the wall", "time of the processor", "peak memory, MiB")):
        values = [[each[place] for each in side] for side in both]
        print(f"{name}, ours / mergekit: {Paired(*values)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        paths = save_models(directory)
        if arguments.mergekit:
            compare(paths, directory / "merged", arguments.rounds)
            return
        times, baselines, memory = [], [], []
        for _ in range(arguments.rounds):
            baselines.append(read_and_write(paths, directory / "copy"))
            seconds, _, peak = merge(MERGE, paths, directory / "merged")
            times.append(seconds)
            memory.append(peak)
            shutil.rmtree(directory / "merged")
    ratio = statistics.median(times) / statistics.median(baselines)
    print(f"merging 4 stages: {statistics.median(times):.1f} s, {ratio:.1f}× reading five files and writing one")
    print(f"peak resident memory of the process: {max(memory):.0f} MiB, imports included")


if __name__ == "__main__":
    main()
