"""Which weights a model has, as one number."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from stagepatch.core.errors import UserError
from stagepatch.core.tensor_stream import TensorReader

_PIECE = 2**18


def model_fingerprint(directory: Path) -> str:
    """SHA-256 of a denoiser's weights, in hex: the same however they are divided into files.

    Args:
        directory: a model directory, with 'transformer/' or 'unet/'.

    Raises:
        UserError: it is none, or its weights are not whole.
    """
    return weights_fingerprint(denoiser_reader(directory))


def weights_fingerprint(reader: TensorReader) -> str:
    """SHA-256 of tensors' names, shapes, dtypes and bytes, by name; they are read a piece at a time."""
    digest = hashlib.sha256()
    for name in sorted(reader.names()):
        digest.update(f"{name} {list(reader.shape(name))} {reader.dtype(name)}\n".encode())
        for piece in reader.pieces(name, _PIECE):
            digest.update(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def denoiser_reader(directory: Path) -> TensorReader:
    """The weights of a model directory's denoiser.

    Raises:
        UserError: it has none.
    """
    for component in ("transformer", "unet"):
        if (directory / component).is_dir():
            return open_weights(directory / component)
    raise UserError(f"'{directory}' has neither 'transformer/' nor 'unet/': it is not a model directory.")


def open_weights(directory: Path) -> TensorReader:
    """The weights in a denoiser's directory.

    Raises:
        UserError: there are none.
    """
    paths = sorted(directory.glob("diffusion_pytorch_model*.safetensors"))
    if not paths:
        raise UserError(f"No weights in '{directory}': looked for diffusion_pytorch_model*.safetensors.")
    return TensorReader(paths)
