"""safetensors files, whole or a tensor at a time: then neither reading nor writing holds more than one in memory.

The library maps a whole file, and writes one only when it has all of it. The format is a length (8 bytes, little
endian), a JSON header of names, dtypes, shapes and offsets, and the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.core.errors import UserError, as_user_error
from stagepatch.core.files import check_exists, write_atomically

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# What a header that is none raises.
_MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or it is truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{path}' is not a whole safetensors file ({error}). It may be truncated, or of another format: "
            f"fetch or write it again."
        ) from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`write_atomically` for a safetensors file. Tensors may live on any device."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each is aligned
    shapes = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in ordered}
    write_stream(path, shapes, lambda name: [tensors[name].detach().cpu()], metadata)


class TensorReader:
    """Tensors of one safetensors file, or of several that hold one model's, read when they are asked for.

    Args:
        paths: files whose names do not overlap.

    Raises:
        UserError: no such file, or one that is truncated or of another format.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in paths:
            header, start = _read_header(path)
            self._places |= {name: (path, start, entry) for name, entry in header.items() if name != "__metadata__"}

    def names(self) -> list[str]:
        """Names of the tensors, in the order of the files."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return tuple(self._places[name][2]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, which is not read.

        Raises:
            UserError: one that is not known here.
        """
        path, _, entry = self._places[name]
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"'{path}' holds '{name}' as {entry['dtype']}, which is none of {', '.join(_DTYPES)}.")
        return _DTYPES[entry["dtype"]]

    def read(self, name: str) -> Tensor:
        """A tensor."""
        size = math.prod(self.shape(name))
        if not size:
            return torch.empty(self.shape(name), dtype=self.dtype(name))
        return next(self.pieces(name, size)).view(self.shape(name))

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """A tensor's numbers in order, `size` of them at a time: [size], the last shorter."""
        path, start, entry = self._places[name]
        first, last = entry["data_offsets"]
        with open(path, "rb") as file:
            file.seek(start + first)
            for place in range(first, last, size * self.dtype(name).itemsize):
                content = torch.empty(min(last - place, size * self.dtype(name).itemsize), dtype=torch.uint8)
                file.readinto(memoryview(content.numpy()))  # type: ignore[arg-type]
                yield content.view(self.dtype(name))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    check_exists(path)
    with (
        as_user_error(f"'{path}' is not a whole safetensors file", *_MALFORMED),
        open(path, "rb") as file,
    ):
        size = path.stat().st_size
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length)) if length <= size else {}
        ends = [_end_of(entry) for name, entry in header.items() if name != "__metadata__"]
    if not ends or size < 8 + length + max(ends):
        raise UserError(f"'{path}' is not a whole safetensors file: fetch or write it again.")
    return header, 8 + length


def _end_of(entry: dict[str, Any]) -> int:
    """Where a tensor's bytes end; its shape, offsets and dtype, if it is one that is read here, must agree."""
    first, last = entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"])
    if not 0 <= first <= last or min(entry["shape"], default=0) < 0:
        raise ValueError(f"a tensor lies from byte {first} to {last}, of shape {entry['shape']}")
    if dtype is not None and last - first != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"{last - first} bytes are not {entry['shape']} of {entry['dtype']}")
    return int(last)


def write_stream(
    path: str | Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whole or not at all, asking for one tensor after the other.

    Args:
        shapes: shape and dtype of each tensor by name.
        pieces: gives the tensor of a name, whole or its numbers in order a piece at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)))
            file.write(encoded)
            for name, (shape, dtype) in shapes.items():
                written = 0
                for piece in pieces(name):
                    content = piece.to(dtype).contiguous().flatten().view(torch.uint8)
                    written += file.write(memoryview(content.numpy()))  # type: ignore[arg-type]
                assert written == math.prod(shape) * dtype.itemsize

    write_atomically(path, write)
