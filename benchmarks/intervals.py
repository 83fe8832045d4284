"""How often 95 % intervals over the images of one set hold, of Gaussians.

    python benchmarks/intervals.py bootstraps [--repeats 300] [--images 300] [--dimensions 8]
    python benchmarks/intervals.py metrics [--repeats 1000] [--images 1000] [--dimensions 8] [--metrics fid kid …]

`bootstraps`: of FID, by the jackknife and by bootstraps. The jackknife and the bootstrap's quantiles are to hold the
mean FID of so many images; the basic bootstrap (2θ − q) takes the excess off, so it is to hold that of the
distributions.
`metrics`: of each metric as `evaluate` gives it, and of its difference of two models from the same noise; they are to
hold the mean over all repeats. 1,000 repeats tell 1.4 points. Beside it the standard error, over what is seen.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch

from stagepatch.evaluation import METRICS, Statistics, compared_over_images, fid, over_images
from stagepatch.evaluation.uncertainty import groups_of, left_out


def main() -> None:
    """Either."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["bootstraps", "metrics"])
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--dimensions", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--metrics", nargs="+", default=["fid", "kid", "precision", "recall", "density", "coverage"])
    args = parser.parse_args()
    of_bootstraps = args.what == "bootstraps"
    args.repeats = args.repeats or (300 if of_bootstraps else 1000)
    args.images = args.images or (300 if of_bootstraps else 1000)
    (show_bootstraps if of_bootstraps else show_metrics)(args)


def share(intervals: Sequence[tuple[float, float]], wanted: float) -> str:
    """How many of them hold a value."""
    return f"{100 * statistics.fmean(low <= wanted <= high for low, high in intervals):.1f} %"


def show_metrics(args: argparse.Namespace) -> None:
    """A line a metric: how often its interval holds, and that of a difference of two models."""
    generator, size = torch.Generator().manual_seed(0), args.dimensions
    torch.manual_seed(0)  # of KID's lots
    reference = torch.randn(args.images, size, generator=generator)
    groups = groups_of(args.images)
    for key in args.metrics:
        metric, seen, found = METRICS[key], ([], []), ([], [])
        given = [Statistics.of(reference) if metric.moments else reference for _ in metric.references]
        for _ in range(args.repeats):
            noise = torch.randn(args.images, size, generator=generator)
            models = [1.1 * noise + 0.2, 1.2 * noise + 0.1]
            without = [left_out(metric, each, given, groups) for each in models]
            values = [metric.function(Statistics.of(each) if metric.moments else each, *given) for each in models]
            difference = compared_over_images(values[0], without[0], values[1], without[1])
            for place, each in enumerate((over_images(values[0], without[0]), difference)):
                seen[place].append(each.mean)
                found[place].append(each)
        for name, values, each in zip((f"{key} of {args.images} images", "   difference"), seen, found, strict=True):
            mean, error = statistics.fmean(values), math.sqrt(statistics.fmean(one.error**2 for one in each))
            held = share([one.interval for one in each], mean)
            print(f"{name} {mean:+.4f}: holds {held}, {error / statistics.stdev(values):.2f}", flush=True)


def show_bootstraps(args: argparse.Namespace) -> None:
    """The biases and the shares of FID."""
    generator, size = torch.Generator().manual_seed(0), args.dimensions
    other = Statistics(0, torch.zeros(size).double(), torch.eye(size).double())
    truth = fid(Statistics(0, torch.full((size,), 0.2).double(), 1.1 * torch.eye(size).double()), other)
    values, shifts, jackknife, quantiles, basic = [], [], [], [], []
    for _ in range(args.repeats):
        drawn = torch.randn(args.images, size, generator=generator).double() * 1.1**0.5 + 0.2
        value = fid(drawn, other)
        again = [
            fid(drawn[torch.randint(args.images, (args.images,), generator=generator)], other)
            for _ in range(args.resamples)
        ]
        low, high = np.quantile(again, [0.025, 0.975])
        values.append(value)
        shifts.append(statistics.fmean(again) - value)
        without = left_out(METRICS["fid_train"], drawn, [other], groups_of(args.images))
        jackknife.append(over_images(value, without).interval)
        quantiles.append((low, high))
        basic.append((2 * value - high, 2 * value - low))
    mean = statistics.fmean(values)
    print(f"FID of the distributions {truth:.4f}, of {args.images} images {mean:.4f}, higher by {mean - truth:.4f}")
    print(f"mean of the bootstrap above the value: {statistics.fmean(shifts):.4f}")
    for name, intervals, wanted in (
        ("jackknife", jackknife, mean),
        ("bootstrap, quantiles", quantiles, mean),
        ("bootstrap, basic, of the distributions", basic, truth),
    ):
        print(f"{name}: holds {share(intervals, wanted)}")


if __name__ == "__main__":
    main()
