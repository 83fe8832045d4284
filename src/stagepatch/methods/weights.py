"""A model's own weights as what a method learned."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_tensors, write_tensors

WEIGHTS_NAME = "weights.safetensors"


def save_weights(model: nn.Module, names: Iterable[str], directory: Path) -> None:
    """Write the named parameters, as they are now: values rather than differences, so that loading is exact."""
    parameters = dict(model.named_parameters())
    write_tensors(directory / WEIGHTS_NAME, {name: parameters[name] for name in names})


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy saved parameters into a model.

    Raises:
        UserError: no such file, or parameters that the model has not, or of other shapes.
    """
    path = directory / WEIGHTS_NAME
    tensors, _ = read_tensors(path)
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UserError(f"'{path}' is of another model: it holds '{name}' of shape {list(value.shape)}.")
    for name, value in tensors.items():
        parameters[name].data.copy_(value)
