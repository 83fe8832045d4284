"""Time and memory of the metrics.

    python benchmarks/metrics.py time [--images 10000]
    python benchmarks/metrics.py memory [--images 50000] [--dimensions 2048] [--metrics fid kid …]

`time`: all metrics of so many digits (training digits with noise) and their intervals, beyond sampling, one by one.
`memory`: the most that measuring so many features adds to what holds them and 10,000 references, over the size of the
features. Below 1, nothing holds them twice.

Seconds are of processor time, so that other work on the machine does not count: OMP_NUM_THREADS=1 makes them a core's.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import psutil
import torch

from stagepatch.data import DataConfig
from stagepatch.evaluation import METRICS, Evaluator, load_extractor, load_references
from stagepatch.evaluation.uncertainty import groups_of, left_out

_IN_MEMORY = ["fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "vendi", "fid_infinity"]


def show_times(images: int) -> None:
    """A line a metric: its value, seconds for it, and for its interval over images."""
    references = load_references(DataConfig())
    evaluator = Evaluator(references, load_extractor("digits"), keys=["all"])
    start = time.process_time()
    drawn = references.train.images[torch.randint(len(references.train), (images,))]
    samples = evaluator.collect(drawn + 0.2 * torch.randn(drawn.shape))
    evaluator.measure_collected(samples, ["fid_train", "fid_held_out"])  # reads the references
    print(f"collecting, and the references: {time.process_time() - start:.1f} s")
    total = time.process_time() - start
    for key in evaluator.measure_collected(samples):
        start = time.process_time()
        value = evaluator.measure_collected(samples, [key])[key]
        middle = time.process_time()
        evaluator.measure_left_out(samples, [key])
        end = time.process_time()
        total += end - start
        print(f"{key}: {value:.4f} in {middle - start:.1f} s, its interval in {end - middle:.1f} s", flush=True)
    print(f"all metrics of {images} digits with intervals: {total:.0f} s")


def show_memory(images: int, dimensions: int, keys: list[str]) -> None:
    """A line a metric: the most that it adds, over the size of the features."""
    features, reference = torch.randn(images, dimensions), torch.randn(10_000, dimensions)
    size, groups = features.numel() * features.itemsize, groups_of(images)
    for key in keys:
        metric = METRICS[key]
        references = [reference for _ in metric.references]
        show_peak(f"{key}, value", size, lambda metric=metric, given=references: metric.function(features, *given))
        if key != "fid_infinity":
            measure = lambda metric=metric, given=references: left_out(metric, features, given, groups)  # noqa: E731
            show_peak(f"{key}, interval", size, measure)


def show_peak(name: str, size: int, measure: Callable[[], object]) -> None:
    """What a call adds to the resident memory at most, over a size."""
    process, is_done, seen = psutil.Process(), threading.Event(), [0]
    held = process.memory_info().rss

    def watch() -> None:
        while not is_done.wait(0.01):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher, start = threading.Thread(target=watch), time.process_time()
    watcher.start()
    measure()
    is_done.set()
    watcher.join()
    print(f"{name}: {(seen[0] - held) / size:.2f} of the features, {time.process_time() - start:.0f} s", flush=True)


def main() -> None:
    """Either."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--metrics", nargs="+", default=_IN_MEMORY)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.what == "time":
        show_times(args.images or 10_000)
    else:
        show_memory(args.images or 50_000, args.dimensions, args.metrics)


if __name__ == "__main__":
    main()
