"""Copies by range, the difference of each matrix to the model's cut to a lower rank: how much of their gain is left?

python experiments/truncate_copies.py fashion runs/copies/experts.yaml runs/copies-of-rank-8 --rank 8

Writes models and an experts.yaml, for `stagepatch evaluate --schedule` or a row of `stagepatch compare`.
"""

import argparse
from pathlib import Path

import torch
import yaml

from stagepatch import load_denoiser
from stagepatch.checkpoints import save_denoiser


def truncate(base: str, experts: Path, output: Path, rank: int) -> None:
    """Write the copies cut to a rank."""
    own, scheduler = load_denoiser(base)
    start = own.state_dict()
    ranges = yaml.safe_load(experts.read_text())["experts"]
    for number, each in enumerate(ranges):
        copy, _ = load_denoiser(experts.parent / each["model"])
        weights = {name: cut(value, start[name], rank) for name, value in copy.state_dict().items()}
        copy.load_state_dict(weights)
        save_denoiser(copy, scheduler, output / f"{number}")
        each["model"] = f"{number}"
    (output / experts.name).write_text(yaml.safe_dump({"experts": ranges}, sort_keys=False))


def cut(value: torch.Tensor, start: torch.Tensor, rank: int) -> torch.Tensor:
    """A matrix whose difference to its start has a lower rank."""
    if value.ndim != 2:
        return value
    left, sizes, right = torch.linalg.svd((value - start).double(), full_matrices=False)
    return start + ((left[:, :rank] * sizes[:rank]) @ right[:rank]).to(value.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("experts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rank", type=int, default=8)
    truncate(**vars(parser.parse_args()))
