"""FID of images: ours (`inception_legacy`) over torch-fidelity's, on the same random weights of Inception-v3.

    python benchmarks/fid_images.py [--images 64] [--size 64] [--rounds 5] [--count 10000] [--whole]

Timed apart: `--images` through the network, out of memory, in batches of 32 (ours) and of 64 (theirs, its default), A
and B in turns, see paired.py; and the distance of two sets of `--count` features, once. From both follows the ratio
for `--count` images against a set of which the features are kept. With `--whole`, `--count` images go through all of
it once on each side, which takes hours without an accelerator. torch-fidelity is to be importable (`make
test-inception`); it imports torchvision for what is not used here, so where that is missing a stand-in is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from paired import paired, seconds
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.evaluation import Statistics, frechet_distance
from stagepatch.evaluation.features import InceptionFeatures, extract_features
from stagepatch.evaluation.inception import Inception


class Bytes(Dataset[Tensor]):
    """Images of 8 bits [3, H, W]."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def save_weights(path: Path) -> None:
    """Random ones that keep activations in range."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5
    torch.save(state, path)


def torch_fidelity() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".transforms", ".transforms.functional", ".datasets", ".models"):
            sys.modules[f"torchvision{name}"] = MagicMock()
    return importlib.import_module("torch_fidelity")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    torch_fidelity()
    utils = importlib.import_module("torch_fidelity.utils")
    fid = importlib.import_module("torch_fidelity.metric_fid")
    options = {"cuda": False, "save_cpu_ram": True, "verbose": False}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights.pth"
        save_weights(path)
        ours = InceptionFeatures(str(path), is_legacy=True)
        theirs = utils.create_feature_extractor(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path), **options
        )

    def our_features(images: Tensor) -> Tensor:
        return extract_features(ours, images.float() / 127.5 - 1.0)

    def their_features(images: Tensor) -> Tensor:
        return utils.get_featuresdict_from_dataset(Bytes(images), theirs, batch_size=64, **options)["2048"]

    def our_distance(one: Tensor, other: Tensor) -> float:
        return frechet_distance(Statistics.of(one), Statistics.of(other))

    def their_distance(one: Tensor, other: Tensor) -> float:
        both = [fid.fid_features_to_statistics(each) for each in (one, other)]
        return fid.fid_statistics_to_metric(*both, verbose=False)[fid.KEY_METRIC_FID]

    generator = torch.Generator().manual_seed(1)
    if arguments.whole:
        images = torch.randint(256, (arguments.count, 3, arguments.size, arguments.size), generator=generator)
        images = images.to(torch.uint8)
        reference = torch.randn(arguments.count, 2048, generator=generator).relu()
        taken = whole([(our_features, our_distance), (their_features, their_distance)], images, reference)
        print(f"FID of {arguments.count} images, ours / torch-fidelity: {taken[0] / taken[1]:.3f}")
        return
    images = torch.randint(256, (arguments.images, 3, arguments.size, arguments.size), generator=generator)
    images = images.to(torch.uint8)
    apart = (our_features(images) - their_features(images)).abs().max() / their_features(images).abs().max()
    of_network = paired(lambda: our_features(images), lambda: their_features(images), arguments.rounds)
    print(f"features of {arguments.images} images, ours / torch-fidelity: {of_network}; {apart:.1e} apart", flush=True)
    features = [torch.randn(arguments.count, 2048, generator=generator).relu() + 0.1 * number for number in (0, 1)]
    found: list[float] = []
    distances = [
        seconds(lambda distance=distance: found.append(distance(*features)))
        for distance in (our_distance, their_distance)
    ]
    print(
        f"distance of 2 × {arguments.count}, ours / torch-fidelity: {distances[0] / distances[1]:.3f} "
        f"({distances[0]:.1f} / {distances[1]:.1f} s); {abs(found[0] / found[1] - 1):.1e} apart"
    )
    both = [
        arguments.count / arguments.images * statistics.median(of_images) + of_sets
        for of_images, of_sets in zip((of_network.first, of_network.second), distances, strict=True)
    ]
    print(f"FID of {arguments.count} images, by these: {both[0] / both[1]:.3f} ({both[0]:.0f} / {both[1]:.0f} s)")


def whole(
    sides: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], float]]],
    images: Tensor,
    reference: Tensor,
) -> list[float]:
    """Seconds of each side, from images to the distance."""
    taken = []
    for features, distance in sides:
        taken.append(seconds(lambda features=features, distance=distance: distance(features(images), reference)))
    return taken


if __name__ == "__main__":
    main()
