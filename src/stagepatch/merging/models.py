"""A base model and its stages into one model (DeMe, arXiv 2410.06664, supplement, Eq. 10)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.checkpoints.layout import denoiser_directory, denoiser_reader
from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core import TensorReader, UserError, write_stream

# Numbers at a time: in the processor's cache, and too few for torch to share among threads, which costs more.
PIECE = 2**15


def combine(base: Tensor, stages: Sequence[Tensor], weights: Sequence[float], ties_keep: float = 0.0) -> Tensor:
    """θ + Σ w_i (θ_i − θ) of one tensor, in float32 or better and back to the base's dtype.

    Without TIES it is computed as (1 − Σ w_i)·θ + Σ w_i·θ_i: weights of zero give the base, and a single weight of one
    gives that stage, exactly.

    Args:
        ties_keep: share of each task vector that TIES-merging (arXiv 2306.01708) keeps, the largest: trim, elect
            signs, mean of those that agree. 0 is the plain sum.
    """
    if not base.is_floating_point():
        return base
    if not ties_keep:
        return _weighted_sum(base, stages, weights)
    trimmed = torch.stack([_trim(stage.double() - base.double(), ties_keep) for stage in stages])
    weighed = trimmed * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)
    elected = weighed.sum(dim=0).sign()
    agrees = (weighed.sign() == elected) & (weighed != 0)
    count = agrees.sum(dim=0).clamp_min(1)
    return (base.double() + (weighed * agrees).sum(dim=0) / count * len(stages)).to(base.dtype)


def _weighted_sum(base: Tensor, stages: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    merged = base.to(wide) * (1.0 - sum(weights))
    for stage, weight in zip(stages, weights, strict=True):
        if weight:
            merged.add_(stage.to(wide), alpha=weight)
    return merged.to(base.dtype)


def _trim(vector: Tensor, keep: float) -> Tensor:
    count = round(keep * vector.numel())
    least = vector.abs().flatten().kthvalue(vector.numel() - count + 1).values if count else math.inf
    return torch.where(vector.abs() >= least, vector, 0.0)


def merge_models(
    base: Path, stages: Sequence[Path], weights: Sequence[float], output: Path, ties_keep: float = 0.0
) -> None:
    """Merge model directories, a tensor at a time, into one that any diffusers code loads.

    Args:
        base: the model that the stages were trained from; the other parts of its pipeline are copied.
        stages: directories whose denoiser has the base's architecture.
        weights: w_i, one a stage.
        ties_keep: see `combine`.

    Raises:
        UserError: other than one weight a stage, or a stage of another architecture, by name of what differs.
    """
    check_weights(stages, weights)
    component = denoiser_directory(base).name
    base_reader, *_ = readers = open_all(base, stages)
    (output / component).mkdir(parents=True, exist_ok=True)
    for part in base.iterdir():
        is_component = part.is_dir() and any(part.glob("*config.json"))  # a training run may lie there too
        if is_component and part.name != component:
            shutil.copytree(part, output / part.name, dirs_exist_ok=True)
        elif part.name == "model_index.json":
            shutil.copy(part, output)
    shutil.copy(base / component / "config.json", output / component / "config.json")

    def merged(name: str) -> Iterator[Tensor]:
        size = piece_size(base_reader.shapes[name][0], ties_keep)
        for piece, *others in zip(*(reader.pieces(name, size) for reader in readers), strict=True):
            yield combine(piece, others, weights, ties_keep)

    write_stream(output / component / "diffusion_pytorch_model.safetensors", base_reader.shapes, merged)


def check_weights(stages: Sequence[Path], weights: Sequence[float]) -> None:
    """Refuse other than one weight a stage."""
    if len(stages) != len(weights) or not stages:
        raise UserError(f"{len(weights)} weights for {len(stages)} stages: give one weight for each.")


def piece_size(shape: Sequence[int], ties_keep: float) -> int:
    """Numbers of a tensor that are merged at a time: TIES looks at all of it."""
    return max(1, math.prod(shape)) if ties_keep else PIECE


def open_all(base: Path, stages: Sequence[Path]) -> list[ProjectedReader]:
    """The tensors of the base, and of stages of the same architecture.

    Raises:
        UserError: a stage whose tensors have other names or shapes than the base's.
    """
    opened = [denoiser_reader(directory) for directory in (base, *stages)]
    base_reader, *others = readers = [ProjectedReader(each, opened) for each in opened]
    for stage, other in zip(stages, others, strict=True):
        odd = sorted(set(base_reader.shapes) ^ set(other.shapes))
        odd = odd or [name for name, (shape, _) in base_reader.shapes.items() if other.shapes[name][0] != shape]
        if odd:
            raise UserError(
                f"The stage '{stage}' has another architecture than the base: {len(odd)} tensors differ, first "
                f"'{odd[0]}'."
            )
    return readers


class ProjectedReader:
    """A model's tensors, and the identity for channel projections that it has not and others have.

    Attributes:
        shapes: shape and dtype by name, the model's own first.
    """

    def __init__(self, reader: TensorReader, others: Sequence[TensorReader]) -> None:
        self._reader, self._added = reader, dict[str, Tensor]()
        self.shapes = {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}
        for other in others:
            for name in other.names():
                if name.startswith(f"{PROJECTION}.") and name not in self.shapes:
                    self._added[name] = torch.eye(other.shape(name)[0], dtype=other.dtype(name))
                    self.shapes[name] = (other.shape(name), other.dtype(name))

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._added[name] if name in self._added else self._reader.read(name)

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """A tensor's numbers in order, `size` of them at a time."""
        return iter(self._added[name].view(-1).split(size)) if name in self._added else self._reader.pieces(name, size)
