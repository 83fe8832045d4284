"""Merging four copies of a 114M-parameter U-Net: peak memory, and time over reading and writing the files once.

    python benchmarks/merge_memory.py [--rounds 3]

Each merge is a process of its own; the baseline reads the same five files and writes one of their size, in
pieces, flushed to the disk as a merge is.
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

MERGE = """
import json, resource, sys, time
from pathlib import Path
from stagepatch.merging import merge_models
base, output, *stages = map(Path, sys.argv[1:])
start = time.perf_counter()
merge_models(base, stages, [0.25] * len(stages), output)
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        paths = save_models(directory)
        times, baselines, memory = [], [], []
        for _ in range(arguments.rounds):
            baselines.append(read_and_write(paths, directory / "copy"))
            command = [sys.executable, "-c", MERGE, paths[0], directory / "merged", *paths[1:]]
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            seconds, peak = json.loads(done.stdout)
            times.append(seconds)
            memory.append(peak)
            shutil.rmtree(directory / "merged")
    ratio = statistics.median(times) / statistics.median(baselines)
    print(f"merging 4 stages: {statistics.median(times):.1f} s, {ratio:.1f}× reading five files and writing one")
    print(f"peak resident memory of the process: {max(memory):.0f} MiB, imports included")


if __name__ == "__main__":
    main()
