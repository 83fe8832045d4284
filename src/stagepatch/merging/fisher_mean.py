"""Stages weighted by their diagonal Fishers (arXiv 2111.09832)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from stagepatch.core import TensorReader, UserError

_FLOOR = 1e-6  # the authors' code has the same number, but of unscaled Fishers, and of its first model's alone


def fisher_mean(base: Tensor, stages: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w_i F_i θ_i / Σ w_i F_i of one tensor, in float64 and back to the base's dtype.

    An F_i counts as 1e-6 at least (ours): where no stage's loss feels a weight, it is the mean by w_i alone.

    Args:
        fishers: F_i, on a scale on which the mean of their squares is about 1; see `Fishers`.
    """
    if not base.is_floating_point():
        return base
    above, below = torch.zeros(base.shape, dtype=torch.float64), torch.zeros(base.shape, dtype=torch.float64)
    for stage, fisher, weight in zip(stages, fishers, weights, strict=True):
        precision = weight * fisher.double().clamp_min(_FLOOR)
        above += precision * stage.double()
        below += precision
    return (above / below).to(base.dtype)


class Fishers:
    """Files of diagonal Fishers, one a stage, as `write_fisher` writes them; read a piece at a time.

    Args:
        normalize: divide each Fisher by the root of its mean square, so that a stage does not weigh more because its
            loss has larger gradients. The authors' code divides by the norm, which gives the same mean. Without, all
            are divided by one number, that of all of them.
        shapes: of the models' tensors, by name.

    Raises:
        UserError: a file that is not there or not whole, or of another model.
    """

    def __init__(
        self, paths: Sequence[Path], shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], normalize: bool = True
    ) -> None:
        self._shapes, self._readers = shapes, [TensorReader([path]) for path in paths]
        for path, reader in zip(paths, self._readers, strict=True):
            odd = [name for name in reader.names() if name not in shapes or shapes[name][0] != reader.shape(name)]
            if odd:
                raise UserError(f"'{path}' is the Fisher of another model: it holds '{odd[0]}'.")
        squares = [_mean_square(reader) for reader in self._readers]
        if not normalize:
            squares = [sum(squares) / len(squares)] * len(squares)
        self._scales = [math.sqrt(square) or 1.0 for square in squares]

    def pieces(self, name: str, size: int) -> Iterator[list[Tensor]]:
        """Of each stage a tensor's numbers in order, `size` of them at a time; 0 where its Fisher has no such tensor:
        it is no parameter, or a projection that the stage has not."""
        count = math.ceil(math.prod(self._shapes[name][0]) / size)
        pieces = [
            reader.pieces(name, size) if name in reader.names() else repeat(torch.zeros(()), count)
            for reader in self._readers
        ]
        for each in zip(*pieces, strict=True):
            yield [piece / scale for piece, scale in zip(each, self._scales, strict=True)]


def _mean_square(reader: TensorReader) -> float:
    total, count = 0.0, 0
    for name in reader.names():
        for piece in reader.pieces(name, 2**18):
            total, count = total + float(piece.double().square().sum()), count + piece.numel()
    return total / max(1, count)
