"""Small images read from files at every step over those decoded once and kept in memory, in images per second.

    python benchmarks/small_images.py [--images 6000] [--size 28] [--batch 128] [--steps 40] [--rounds 5]
        [--workers 0]

Images are grey PNG files of noise, blurred, in one folder. Both ways give the batches of the training loop's own
order; they alternate in one process, and each figure is a median. Reading the headers, which both do, and decoding are
timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from stagepatch.data import DataConfig, Images, decode_once, open_source
from stagepatch.training import load_batches


def make_images(directory: Path, count: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(generator.integers(0, 255, (size, size), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(2)).save(directory / f"{number:05d}.png")


def images_per_second(dataset: Any, arguments: argparse.Namespace, start: int) -> float:
    loader = load_batches(dataset, arguments.batch, start, start + arguments.steps, 0, arguments.workers)
    since = time.perf_counter()
    seen = sum(len(batch["image"]) for batch in loader)
    return seen / (time.perf_counter() - since)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    with tempfile.TemporaryDirectory() as temporary:
        make_images(Path(temporary), arguments.images, arguments.size)
        config = DataConfig(source=temporary, image_size=arguments.size, channels=1)
        began = time.perf_counter()
        images = Images(open_source(config), config)
        opened = time.perf_counter()
        (pixels,) = decode_once([images])
        print(f"headers {opened - began:.2f} s, decoding {time.perf_counter() - opened:.2f} s")
        speeds: dict[str, list[float]] = {"files": [], "memory": []}
        for number in range(arguments.rounds):
            for name, dataset in (("files", images), ("memory", pixels)):
                speeds[name].append(images_per_second(dataset, arguments, number * arguments.steps))
    files, memory = (statistics.median(values) for values in speeds.values())
    print(f"files {files:,.0f} images/s, memory {memory:,.0f} images/s: {memory / files:.1f}×")


if __name__ == "__main__":
    main()
