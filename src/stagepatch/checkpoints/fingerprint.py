"""Fingerprints: numbers (SHA-256, in hex) that change with weights, or with what a directory holds.

Each kind has its own reach; caches, journals and stages keep them, so none may change.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from stagepatch.checkpoints.layout import denoiser_reader
from stagepatch.core import TensorReader

_PIECE = 2**18


def model_fingerprint(directory: Path) -> str:
    """Of a denoiser's weights, wholly: the same however they are divided into files.

    Args:
        directory: a model directory, with 'transformer/' or 'unet/'.

    Raises:
        UserError: it is none, or its weights are not whole.
    """
    return weights_fingerprint(denoiser_reader(directory))


def weights_fingerprint(reader: TensorReader) -> str:
    """Of tensors' names, shapes, dtypes and bytes, by name; they are read a piece at a time."""
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        digest.update(f"{name} {list(reader.shape(name))} {reader.dtype(name)}\n".encode())
        for piece in reader.pieces(name, _PIECE):
            digest.update(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def module_fingerprint(module: nn.Module) -> str:
    """Of a loaded module's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        for part in _parts(tensor):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(tensor: Any) -> list[Tensor]:
    """A tensor, or those that a library's own kind of tensor, such as a quantised one, is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def files_fingerprint(directory: Path) -> str:
    """Of the safetensors files below a directory, wholly: other when they are divided otherwise."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.safetensors")):
        digest.update(str(path.relative_to(directory)).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def sampled_fingerprint(directory: Path) -> str:
    """Of all files below a directory: names, sizes and samples of the content, since weights are many gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with open(path, "rb") as file:
            for place in range(17):
                file.seek(max(0, size - 65536) * place // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()
