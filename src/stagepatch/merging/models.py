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
from stagepatch.core import TensorReader, UserError, copy_file, read_json, write_stream
from stagepatch.merging.config import SUM, MergeMethod, check_weights
from stagepatch.merging.dare import drop
from stagepatch.merging.fisher_mean import Fishers, fisher_mean

# Numbers at a time: in the processor's cache, and too few for torch to share among threads, which costs more.
PIECE = 2**15


def combine(
    base: Tensor, stages: Sequence[Tensor], weights: Sequence[float], method: MergeMethod = SUM, name: str = ""
) -> Tensor:
    """θ + Σ w_i (θ_i − θ) of one tensor, in float32 or better and back to the base's dtype.

    The sum is computed as (1 − Σ w_i)·θ + Σ w_i·θ_i: weights of zero give the base, and a single weight of one
    gives that stage, exactly. By other methods the task vectors are dropped and rescaled (DARE), trimmed, signs are
    elected, and the mean of those that agree is taken (TIES), as far as the method asks for it.

    TIES and peft's `ties`: with equal weights, this is N times that for N stages, so that weights of 1/N are peft's
    weights of 1, the paper's λ = 1. With unequal weights, signs are elected here among w_i (θ_i − θ), in peft among
    θ_i − θ. Where those sum to zero, nothing is added here; peft takes the positive ones. A share that is no whole
    number of weights is rounded here, and what is as large as the least that is kept is kept too; peft rounds down.

    Args:
        method: any but 'fisher', which is no sum of task vectors; see `fisher_mean`.
        name: of the tensor, for DARE's draws.
    """
    if not base.is_floating_point():
        return base
    assert method.kind != "fisher", "it is no sum of task vectors"
    if method.kind == "sum":
        return _weighted_sum(base, stages, weights)
    vectors = [stage.double() - base.double() for stage in stages]
    if method.dare_drop:
        vectors = drop(vectors, method, name)
    if method.ties_keep:
        vectors = [_trim(vector, method.ties_keep) for vector in vectors]
    weighed = torch.stack(vectors) * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)
    total = weighed.sum(dim=0)
    if method.kind in ("ties", "dare_ties"):
        agrees = (weighed.sign() == total.sign()) & (weighed != 0)
        total = (weighed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1) * len(stages)
    return (base.double() + total).to(base.dtype)


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
    base: Path,
    stages: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    method: MergeMethod = SUM,
    fishers: Sequence[Path] = (),
) -> None:
    """Merge model directories, a tensor at a time, into one that any diffusers code loads.

    Args:
        base: the model that the stages were trained from; the other parts of its pipeline are copied.
        stages: directories whose denoiser has the base's architecture.
        weights: w_i, one a stage.
        method: see `combine`, and for 'fisher' `fisher_mean`.
        fishers: of 'fisher', the file of each stage's, as `write_fisher` writes it.

    Raises:
        UserError: weights or Fishers that the stages cannot have, or a stage of another architecture, by name of what
            differs.
    """
    check_weights(stages, weights, method)
    is_mean = method.kind == "fisher"
    if len(fishers) != (len(stages) if is_mean else 0):
        raise UserError(f"{len(fishers)} Fishers for {len(stages)} stages: merge_method='fisher' needs one for each.")
    component = denoiser_directory(base).name
    base_reader, *_ = readers = open_all(base, stages)
    precisions = Fishers(fishers, base_reader.shapes, method.normalize) if is_mean else None
    (output / component).mkdir(parents=True, exist_ok=True)
    for part in base.iterdir():
        is_component = part.is_dir() and any(part.glob("*config.json"))  # a training run may lie there too
        if is_component and part.name != component:
            shutil.copytree(part, output / part.name, copy_function=copy_file, dirs_exist_ok=True)
        elif part.name == "model_index.json":
            copy_file(part, output)
    copy_file(base / component / "config.json", output / component / "config.json")

    def merged(name: str) -> Iterator[Tensor]:
        size = piece_size(base_reader.shapes[name][0], method)
        pieces = zip(*(reader.pieces(name, size) for reader in readers), strict=True)
        if precisions is None:
            for piece, *others in pieces:
                yield combine(piece, others, weights, method, name)
        else:
            for (piece, *others), own in zip(pieces, precisions.pieces(name, size), strict=True):
                yield fisher_mean(piece, others, own, weights)

    write_stream(output / component / "diffusion_pytorch_model.safetensors", base_reader.shapes, merged)


def piece_size(shape: Sequence[int], method: MergeMethod) -> int:
    """Numbers of a tensor that are merged at a time: TIES looks at all of it, and DARE's draws are of all of it."""
    return PIECE if method.kind in ("sum", "fisher") else max(1, math.prod(shape))


def open_all(base: Path, stages: Sequence[Path]) -> list[ProjectedReader]:
    """The tensors of the base, and of stages of the same architecture.

    Raises:
        UserError: quantised weights, or a stage whose tensors have other names or shapes than the base's.
    """
    for directory in (base, *stages):
        config = denoiser_directory(directory) / "config.json"
        if config.exists() and "quantization_config" in read_json(config):
            raise UserError(f"The weights in '{directory}' are quantised, and such are not merged: give plain ones.")
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
