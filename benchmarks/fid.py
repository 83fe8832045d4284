"""The Fréchet distance by symmetric eigenvalues over SciPy's `sqrtm`, at the 2,048 dimensions of Inception-v3.

    python benchmarks/fid.py [--dimensions 2048] [--rounds 5]

A and B alternate in one process, on the same statistics of correlated features; the figure is the median of the
rounds' ratios. Both values are shown, and their relative difference, which is to be below 1e-6.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import scipy.linalg
import torch

from stagepatch.evaluation import Statistics, frechet_distance


def make_statistics(dimensions: int, seed: int) -> Statistics:
    """Of features with a spectrum that falls as those of real networks do, n = 5 F."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(0))
    mixing *= torch.arange(1, dimensions + 1).float().pow(-0.5).unsqueeze(1)
    features = torch.randn(5 * dimensions, dimensions, generator=generator) @ mixing + 0.1 * seed
    return Statistics.of(features.relu())


def by_sqrtm(one: Statistics, other: Statistics) -> float:
    """As pytorch-fid and clean-fid have it."""
    root = scipy.linalg.sqrtm(one.covariance.numpy() @ other.covariance.numpy())
    means = (one.mean - other.mean).square().sum()
    return float(means + one.covariance.trace() + other.covariance.trace() - 2 * np.trace(root).real)


def main() -> None:
    """Print every round, and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one, other = (make_statistics(args.dimensions, seed) for seed in (1, 2))
    ratios = []
    for number in range(args.rounds):
        seconds, values = [], []
        for distance in (frechet_distance, by_sqrtm):
            start = time.perf_counter()
            values.append(distance(one, other))
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
        apart = abs(values[0] / values[1] - 1)
        print(
            f"round {number}: {seconds[0]:.2f} s, sqrtm {seconds[1]:.2f} s, {ratios[-1]:.1f} times as fast;", end=" "
        )
        print(f"{values[0]:.9g} and {values[1]:.9g}, apart by {apart:.1e}", flush=True)
    print(f"{args.dimensions} dimensions: {statistics.median(ratios):.1f} times as fast as sqrtm (median).")


if __name__ == "__main__":
    main()
