"""Cosines between task vectors, what training on from a base added to it (DeMe, arXiv 2410.06664, Fig. 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stagepatch.checkpoints.projection import PROJECTION
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from stagepatch.methods.weights import WEIGHTS_NAME

_COMPONENTS = ("transformer", "unet")


class Tensors(Protocol):
    """Tensors of files, read when they are asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


OpenTensors = Callable[[list[Path]], Tensors]


@dataclass
class TaskVectors:
    """Inner products of task vectors, from which norms and cosines follow.

    Args:
        names: of the stages, [n].
        products: <τ_i, τ_j> of each block of the model, [n, n].
        sizes: weights of each block.
    """

    names: list[str]
    products: dict[str, Tensor]
    sizes: dict[str, int]

    def cosine(self, block: str | None = None) -> Tensor:
        """[n, n] of one block, or of all weights; NaN where a task vector is zero."""
        products, norms = self._products(block), self.norms(block)
        return products / (norms.unsqueeze(1) * norms)

    def norms(self, block: str | None = None) -> Tensor:
        """|τ_i| of one block, or of all weights: [n]."""
        return self._products(block).diagonal().sqrt()

    def _products(self, block: str | None) -> Tensor:
        return self.products[block] if block is not None else torch.stack(list(self.products.values())).sum(dim=0)


def find_stages(directory: Path) -> list[Path]:
    """The directories in its 'stages/', by number.

    Raises:
        UserError: there are none.
    """
    found = [path for path in directory.glob("stages/*") if path.is_dir() and path.name.isdigit()]
    if not found:
        raise UserError(
            f"'{directory}' has no 'stages/0', 'stages/1', …: give two or more directories of stages, or one that has "
            f"these."
        )
    return sorted(found, key=lambda path: int(path.name))


def task_vectors(
    base: Path,
    stages: Mapping[str, Path],
    open_tensors: OpenTensors,
    on_tensor: Callable[[int, int], None] | None = None,
) -> TaskVectors:
    """Compare θ_i − θ, a tensor at a time: at most one tensor of each stage is in memory.

    A channel-wise projection that a stage has and the base has not was the identity in the base.

    Args:
        base: the model directory that the stages were trained on from.
        stages: directories of models, of weights, or of LoRAs (B·A, all ranks on), by name.
        open_tensors: gives the tensors of files.
        on_tensor: called with the numbers done and to do after each tensor.

    Raises:
        UserError: fewer than two stages, one that is not there or holds no weights, or is of another model.
    """
    if len(stages) < 2:
        raise UserError(f"{len(stages)} stages make no pair of task vectors: give two or more.")
    reader = open_tensors(_weights(base, _component(base)))
    opened = [_open_stage(stage, reader, open_tensors) for stage in stages.values()]
    names = [name for name in reader.names() if reader.dtype(name).is_floating_point]
    names += sorted({name for stage in opened for name in stage.names()} - set(reader.names()))
    products: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for done, name in enumerate(names, 1):
        weights = reader.read(name) if name in reader.names() else _identity(name, opened)
        deltas = [stage.delta(name, weights.double().flatten()) for stage in opened]
        block = _block_of(name)
        products[block] = products.get(block, 0.0) + _products(deltas)
        sizes[block] = sizes.get(block, 0) + weights.numel()
        if on_tensor is not None:
            on_tensor(done, len(names))
    return TaskVectors(list(stages), products, sizes)


def _products(deltas: list[Tensor | None]) -> Tensor:
    rows = [
        [torch.zeros((), dtype=torch.float64) if one is None or two is None else one @ two for two in deltas]
        for one in deltas
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _block_of(name: str) -> str:
    """'blocks.3' of 'blocks.3.attn.qkv.weight'; the first part of a name without a number."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name.split(".")[0]


class _Stage(Protocol):
    def names(self) -> list[str]:
        """Of what it holds."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of these."""

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        """τ of one of the base's tensors, in float64, flat; None is zero."""


class _Weights:
    """A model's weights, or those of them that were trained."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.held = set(tensors.names())

    def names(self) -> list[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        return self.tensors.read(name).double().flatten() - base if name in self.held else None


class _LoRA:
    """B·A of every layer that has them; alpha equals the rank, so they are not scaled."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        found = [name.removesuffix(".lora_A.weight") for name in tensors.names() if name.endswith(".lora_A.weight")]
        # The first part names the denoiser in its pipeline.
        self.layers = {f"{layer.split('.', 1)[1]}.weight": layer for layer in found}

    def names(self) -> list[str]:
        return list(self.layers)

    def shape(self, name: str) -> tuple[int, ...]:
        down, up = (self.tensors.shape(f"{self.layers[name]}.lora_{side}.weight") for side in "AB")
        return (up[0], *down[1:])

    def delta(self, name: str, base: Tensor) -> Tensor | None:
        if name not in self.layers:
            return None
        down, up = (self.tensors.read(f"{self.layers[name]}.lora_{side}.weight").double() for side in "AB")
        return (up.flatten(1) @ down.flatten(1)).flatten()


def _open_stage(directory: Path, base: Tensors, open_tensors: OpenTensors) -> _Stage:
    if not directory.is_dir():
        raise UserError(f"No stage at '{directory}': no such directory.")
    stage: _Stage
    if (directory / LORA_CONFIG).exists():
        stage = _LoRA(open_tensors([directory / LORA_FILE]))
    elif (directory / WEIGHTS_NAME).exists():
        stage = _Weights(open_tensors([directory / WEIGHTS_NAME]))
    elif any((directory / component).is_dir() for component in _COMPONENTS):
        stage = _Weights(open_tensors(_weights(directory, _component(directory))))
        missing = set(base.names()) - set(stage.names())
        if missing:
            raise UserError(f"The stage '{directory}' is of another model than the base: it lacks '{min(missing)}'.")
    elif (directory / "config.json").exists() and "patch" in read_json(directory / "config.json"):
        raise UserError(
            f"'{directory}' holds a patch, which changes none of the model's weights and so has no task vector; give "
            f"it as one of `learned`, to see where it changes the loss."
        )
    else:
        raise UserError(f"'{directory}' is no stage: it holds no model, no LoRA and no {WEIGHTS_NAME}.")
    known = set(base.names())
    for name in stage.names():
        shape = stage.shape(name)
        is_same = shape == base.shape(name) if name in known else _is_projection(name, shape)
        if not is_same:
            raise UserError(
                f"The stage '{directory}' is of another model than the base: it holds '{name}' of shape {list(shape)}."
            )
    return stage


def _is_projection(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith(f"{PROJECTION}.") and len(shape) == 2 and shape[0] == shape[1]


def _identity(name: str, stages: Sequence[_Stage]) -> Tensor:
    """What a projection that only stages have is in the base."""
    return torch.eye(next(stage.shape(name)[0] for stage in stages if name in stage.names()))


def _component(directory: Path) -> str:
    for component in _COMPONENTS:
        if (directory / component).is_dir():
            return component
    raise UserError(f"'{directory}' has neither 'transformer/' nor 'unet/': it is not a model directory.")


def _weights(directory: Path, component: str) -> list[Path]:
    paths = sorted((directory / component).glob("diffusion_pytorch_model*.safetensors"))
    if not paths:
        raise UserError(f"No weights in '{directory / component}': looked for diffusion_pytorch_model*.safetensors.")
    return paths
