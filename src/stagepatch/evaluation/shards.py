"""What is collected of many images, a few hundred at a time: kept as files, so that a killed run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import (
    TensorReader,
    UserError,
    check_unchanged,
    processes,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from stagepatch.core.settings import as_json

PLAN_NAME = "plan.json"


class Shards:
    """Tensors of images 0 … count − 1, in files of a directory, each whole or absent; iterated, shard by shard.

    A shard that is not there, or is broken, is made when it is come to. Each is made at once and by one process, so
    that its bits depend neither on where a run was stopped nor on how many processes share it.

    Args:
        directory: takes the files.
        count: of images.
        make: the numbers of some images -> tensors by name, a row an image.
        size: images in a file.
        must_write: where False, a file that cannot be written costs time later, and nothing else.
    """

    def __init__(
        self,
        directory: Path,
        count: int,
        make: Callable[[range], Mapping[str, Tensor]],
        size: int,
        must_write: bool = True,
    ) -> None:
        self.directory, self.count, self.size = directory, count, size
        self._make, self._must_write = make, must_write

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for number in range(len(self)):
            with suppress(UserError):
                tensors = read_tensors(self._path(number))[0]
                if self._rows(tensors) == len(self._images(number)):
                    yield tensors
                    continue
            yield self._made(number)

    def make_own(self, on_batch: Callable[[int], None] | None = None) -> None:
        """This process's share of what is missing.

        Args:
            on_batch: called with the number of images in each file that is there already.
        """
        state = processes()
        for number in range(state.process_index, len(self), state.num_processes):
            if not self._is_there(number):
                self._made(number)
            elif on_batch is not None:
                on_batch(len(self._images(number)))

    def names(self) -> list[str]:
        """Of the tensors, as the first shard has them."""
        return [*next(iter(self))]

    def gathered(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """All of them, by name: [count, …]. They are held once, and one shard besides.

        Args:
            names: of those that are wanted; all by default.
        """
        whole: dict[str, Tensor] = {}
        place = 0
        for shard in self:
            for name, tensor in shard.items():
                if names is not None and name not in names:
                    continue
                if name not in whole:
                    whole[name] = torch.empty(self.count, *tensor.shape[1:], dtype=tensor.dtype)
                whole[name][place : place + len(tensor)] = tensor
            place += self._rows(shard)
        return whole

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:05d}.safetensors"

    def _images(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def _rows(self, tensors: Mapping[str, Tensor]) -> int:
        return len(next(iter(tensors.values()), ()))

    def _is_there(self, number: int) -> bool:
        with suppress(UserError):
            return bool(TensorReader([self._path(number)]).names())
        return False

    def _made(self, number: int) -> Mapping[str, Tensor]:
        tensors = self._make(self._images(number))
        with nullcontext() if self._must_write else suppress(UserError):
            write_tensors(self._path(number), tensors)
        return tensors


def begin_shards(directory: Path, settings: Mapping[str, Any], ignored: Iterable[str] = ()) -> None:
    """Make ready a directory of shards: empty, or with those of a run that was stopped, if it had the same settings.

    Args:
        ignored: names of settings that may differ.

    Raises:
        UserError: it holds those of other settings, by name of what differs.
    """
    state = processes()
    if (directory / PLAN_NAME).exists():
        found = f"'{directory}' holds part of an evaluation of other settings"
        way_out = "Go on with those, give another output_dir, or delete it."
        check_unchanged(read_json(directory / PLAN_NAME), settings, found, way_out, ignored=[*ignored])
    elif state.is_main_process:
        shutil.rmtree(directory, ignore_errors=True)
        write_json(directory / PLAN_NAME, as_json(settings))
    state.wait_for_everyone()


def finish_shards(directory: Path) -> None:
    """Remove a directory of shards, once what was measured of them is written; and the one that it is in, if empty."""
    (directory / PLAN_NAME).unlink(missing_ok=True)  # first: without it the rest counts for nothing
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        directory.parent.rmdir()
