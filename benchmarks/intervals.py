"""How often 95 % intervals of FID over the images of one set hold, of Gaussians: jackknife and bootstraps.

    python benchmarks/intervals.py [--repeats 300] [--images 300] [--dimensions 8]

The jackknife and the bootstrap's quantiles are to hold the mean FID of so many images; the basic bootstrap (2θ − q)
takes the excess off, so it is to hold that of the distributions.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from stagepatch.evaluation import METRICS, Statistics, fid, over_images
from stagepatch.evaluation.uncertainty import groups_of, left_out


def main() -> None:
    """Print the biases and the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--dimensions", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
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
        print(f"{name}: holds {100 * statistics.fmean(low <= wanted <= high for low, high in intervals):.1f} %")


if __name__ == "__main__":
    main()
