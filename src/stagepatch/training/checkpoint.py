"""The whole state of a run in one safetensors file, replaced in one rename."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core.errors import UserError
from stagepatch.core.tensors import read_tensors, write_tensors
from stagepatch.core.settings import as_json, check_unchanged
from stagepatch.training.config import BOOKKEEPING
from stagepatch.training.run_config import TrainConfig

CHECKPOINT_NAME = "checkpoint.safetensors"


def save_checkpoint(
    directory: Path,
    iteration: int,
    identity: dict[str, Any],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Any | None,
    scaler: Any | None,
) -> None:
    """Write parameters, optimizer state, average and iteration.

    Args:
        identity: the settings that a resumed run must share.
    """
    for unfinished in directory.glob(f".{CHECKPOINT_NAME}.*"):
        unfinished.unlink(missing_ok=True)  # A run was killed while it wrote this.
    tensors: dict[str, Tensor] = {f"trained.{index}": value for index, value in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    if ema is not None:
        tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow_params)}
    metadata = {
        "iteration": str(iteration),
        "identity": json.dumps(as_json(identity), sort_keys=True),
        "ema_step": str(ema.optimization_step if ema is not None else 0),
        "scaler": json.dumps(scaler.state_dict() if scaler is not None else {}),
    }
    write_tensors(directory / CHECKPOINT_NAME, tensors, metadata)


def load_checkpoint(
    directory: Path,
    identity: dict[str, Any],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Any | None,
    scaler: Any | None,
) -> int:
    """Restore what `save_checkpoint` wrote.

    Returns:
        The iteration to go on from; 0 where there is no checkpoint.

    Raises:
        UserError: the checkpoint is of a run with other settings or of another model, or not a whole file.
    """
    path = directory / CHECKPOINT_NAME
    if not path.exists():
        return 0
    tensors, metadata = read_tensors(path)
    if "iteration" not in metadata or "identity" not in metadata:
        raise UserError(f"'{path}' is not a checkpoint of stagepatch: move it away, or choose another output_dir.")
    found = f"'{path}' is the checkpoint of a run with other settings"
    way_out = "Go on with the former settings, or choose another output_dir."
    check_unchanged(json.loads(metadata["identity"]), identity, found, way_out, TrainConfig(), BOOKKEEPING)
    _check_shapes(path, tensors, parameters, [] if ema is None else ema.shadow_params)
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"trained.{index}"])
    _restore_optimizer(optimizer, tensors)
    if ema is not None:
        ema.optimization_step = int(metadata["ema_step"])
        for index, shadow in enumerate(ema.shadow_params):
            shadow.copy_(tensors[f"ema.{index}"])
    if scaler is not None:
        scaler.load_state_dict(json.loads(metadata["scaler"]))
    return int(metadata["iteration"])


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_shapes(
    path: Path, tensors: dict[str, Tensor], parameters: list[nn.Parameter], averages: list[Tensor]
) -> None:
    values: dict[str, Sequence[Tensor]] = {"trained": parameters, "ema": averages}
    expected = {f"{kind}.{index}": value.shape for kind in values for index, value in enumerate(values[kind])}
    found = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    odd = [name for name in sorted({*expected, *found}) if found.get(name) != expected.get(name)]
    if odd:
        given, wanted = (shapes.get(odd[0]) for shapes in (found, expected))
        raise UserError(
            f"'{path}' is the checkpoint of another model's run: {odd[0]} is "
            f"{given and list(given)}, expected {wanted and list(wanted)}. Choose another output_dir."
        )
