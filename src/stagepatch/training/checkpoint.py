"""The whole state of a run in one safetensors file, replaced in one rename."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, as_json, as_user_error, check_unchanged, read_tensors, write_tensors
from stagepatch.training.config import BOOKKEEPING
from stagepatch.training.optimizers import restore_state, state_of
from stagepatch.training.posthoc_ema import PowerAverages
from stagepatch.training.run_config import TrainConfig

CHECKPOINT_NAME = "checkpoint.safetensors"
# What odd metadata raise.
_ODD = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError)


@dataclass
class TrainingState:
    """What a checkpoint holds.

    Args:
        path: of the checkpoint.
        identity: the settings that a resumed run must share.
        parameters: those that are trained.
        ema: their average, if there is one.
        scaler: of the loss; it may be one that is off.
        posthoc: averages for post-hoc EMA, if there are some.
    """

    path: Path
    identity: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Any | None
    scaler: torch.amp.GradScaler
    posthoc: PowerAverages | None = None

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and averages by their names in the file."""
        named: dict[str, Tensor] = {f"trained.{index}": value.data for index, value in enumerate(self.parameters)}
        averages = [] if self.ema is None else self.ema.shadow_params
        named |= {f"ema.{index}": value for index, value in enumerate(averages)}
        return named if self.posthoc is None else named | self.posthoc.tensors()

    def save(self, iteration: int) -> None:
        """Write it, as of the end of an iteration."""
        tensors = self._tensors()
        kept = state_of(self.optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
        metadata = {
            "iteration": str(iteration),
            "identity": json.dumps(as_json(self.identity), sort_keys=True),
            "ema_step": str(self.ema.optimization_step if self.ema is not None else 0),
            "scaler": json.dumps(self.scaler.state_dict()),
            "optimizer": json.dumps({name: each for name, each in kept.items() if not isinstance(each, Tensor)}),
        }
        write_tensors(self.path, tensors, metadata)

    def load(self) -> int:
        """Restore what `save` wrote.

        Returns:
            The iteration to go on from; 0 where there is no checkpoint.

        Raises:
            UserError: the checkpoint is of a run with other settings or of another model, or not a whole file.
        """
        if not self.path.exists():
            return 0
        tensors, metadata = read_tensors(self.path)
        if "iteration" not in metadata or "identity" not in metadata:
            raise UserError(
                f"'{self.path}' is not a checkpoint of stagepatch: move it away, or choose another output_dir."
            )
        broken = f"'{self.path}' is not as it was written: restore it, or choose another output_dir"
        with as_user_error(broken, *_ODD):
            iteration, ema_step = int(metadata["iteration"]), 0 if self.ema is None else int(metadata["ema_step"])
            then, scaler = dict(json.loads(metadata["identity"])), json.loads(metadata["scaler"])
            kept = dict(json.loads(metadata.get("optimizer", "{}")))  # checkpoints of 0.1.0 have tensors alone
            if iteration < 0 or ema_step < 0:
                raise ValueError(f"iteration {min(iteration, ema_step)}")
        found = f"'{self.path}' is the checkpoint of a run with other settings"
        way_out = "Go on with the former settings, or choose another output_dir."
        check_unchanged(then, self.identity, found, way_out, TrainConfig(), BOOKKEEPING)
        for name in [name for name in tensors if name.startswith("optimizer.")]:
            kept[name.removeprefix("optimizer.")] = tensors.pop(name)
        self._fill(tensors)
        with as_user_error(broken, *_ODD):
            restore_state(self.optimizer, kept)
            self.scaler.load_state_dict(scaler)
        if self.ema is not None:
            self.ema.optimization_step = ema_step
        return iteration

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        own = self._tensors()
        expected, found = ({name: list(value.shape) for name, value in each.items()} for each in (own, tensors))
        odd = [name for name in sorted({*expected, *found}) if found.get(name) != expected.get(name)]
        if odd:
            raise UserError(
                f"'{self.path}' is the checkpoint of another model's run: {odd[0]} is {found.get(odd[0])}, expected "
                f"{expected.get(odd[0])}. Choose another output_dir."
            )
        for name, value in own.items():
            value.copy_(tensors[name])
