"""A base model and its stages into one model (DeMe, arXiv 2410.06664, Eq. 9)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.checkpoints.fingerprint import open_weights
from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core.errors import UserError
from stagepatch.core.tensor_stream import TensorReader, write_stream

# Numbers at a time: in the processor's cache, and too few for torch to share among threads, which costs more.
PIECE = 2**15
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Ties:
    """TIES-merging (arXiv 2306.01708): trim, elect signs, mean of those that agree.

    Args:
        keep: share of each tensor's task vector that is kept, the largest.
    """

    keep: float = 0.2


def combine(base: Tensor, stages: Sequence[Tensor], weights: Sequence[float], ties: Ties | None = None) -> Tensor:
    """θ + Σ w_i (θ_i − θ) of one tensor, in float32 or better and back to the base's dtype.

    Without TIES it is computed as (1 − Σ w_i)·θ + Σ w_i·θ_i: weights of zero give the base, and a single weight of one
    gives that stage, exactly.
    """
    if not base.is_floating_point():
        return base
    if ties is None:
        return _weighted_sum(base, stages, weights)
    vectors = torch.stack([stage.double() - base.double() for stage in stages])
    trimmed = torch.stack([_trim(vector, ties.keep) for vector in vectors])
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
    if count == 0:
        return torch.zeros_like(vector)
    least = vector.abs().flatten().kthvalue(vector.numel() - count + 1).values
    return torch.where(vector.abs() >= least, vector, 0.0)


def merge_models(
    base: Path, stages: Sequence[Path], weights: Sequence[float], output: Path, ties: Ties | None = None
) -> None:
    """Merge model directories, a tensor at a time, into one that any diffusers code loads.

    Args:
        base: the model that the stages were trained from; the other parts of its pipeline are copied.
        stages: directories whose denoiser has the base's architecture.
        weights: w_i, one a stage.

    Raises:
        UserError: other than one weight a stage, or a stage of another architecture, by name of what differs.
    """
    if len(stages) != len(weights) or not stages:
        raise UserError(f"{len(weights)} weights for {len(stages)} stages: give one weight for each.")
    component = next((name for name in ("transformer", "unet") if (base / name).is_dir()), None)
    if component is None:
        raise UserError(f"'{base}' has neither 'transformer/' nor 'unet/': it is not a model directory.")
    found = [open_weights(directory / component) for directory in (base, *stages)]
    reader, *readers = [ProjectedReader(each, found) for each in found]
    for stage, other in zip(stages, readers, strict=True):
        check_same(reader, other, stage)
    (output / component).mkdir(parents=True, exist_ok=True)
    for part in base.iterdir():
        if (
            part.is_dir() and part.name != component and any(part.glob("*config.json"))
        ):  # a training run may lie in the same directory
            shutil.copytree(part, output / part.name, dirs_exist_ok=True)
        elif part.name == "model_index.json":
            shutil.copy(part, output)
    shutil.copy(base / component / "config.json", output / component / "config.json")
    shapes = {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}
    write_stream(
        output / component / _WEIGHTS,
        shapes,
        lambda name: _merged(name, reader, readers, weights, ties),
    )


class ProjectedReader:
    """A model's tensors, and the identity for channel projections that it has not and others have."""

    def __init__(self, reader: TensorReader, others: Sequence[TensorReader]) -> None:
        self._reader = reader
        own = set(reader.names())
        self._added = {
            name: other
            for other in others
            for name in other.names()
            if name.startswith(f"{PROJECTION}.") and name not in own
        }

    def names(self) -> list[str]:
        """The model's own, then the added."""
        return [*self._reader.names(), *self._added]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return self._added.get(name, self._reader).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, which is not read."""
        return self._added.get(name, self._reader).dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor."""
        if name in self._added:
            return torch.eye(self.shape(name)[0], dtype=self.dtype(name))
        return self._reader.read(name)

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """A tensor's numbers in order, `size` of them at a time."""
        if name in self._added:
            return iter(self.read(name).view(-1).split(size))
        return self._reader.pieces(name, size)


def _merged(
    name: str, base: ProjectedReader, stages: Sequence[ProjectedReader], weights: Sequence[float], ties: Ties | None
) -> Iterator[Tensor]:
    """A tensor in pieces that stay in the processor's cache; with TIES, which looks at all of it, whole."""
    if ties is not None:
        yield combine(base.read(name), [stage.read(name) for stage in stages], weights, ties)
        return
    for piece, *others in zip(base.pieces(name, PIECE), *(stage.pieces(name, PIECE) for stage in stages), strict=True):
        yield combine(piece, others, weights)


def check_same(base: ProjectedReader, other: ProjectedReader, stage: Path) -> None:
    """Refuse a stage whose tensors have other names or shapes than the base's."""
    odd = sorted(set(base.names()) ^ set(other.names()))
    odd = odd or [name for name in base.names() if base.shape(name) != other.shape(name)]
    if odd:
        raise UserError(
            f"The stage '{stage}' has another architecture than the base: {len(odd)} tensors differ, first '{odd[0]}'."
        )
