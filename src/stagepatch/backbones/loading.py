"""A denoiser and its scheduler as a directory, laid out as diffusers lays out a pipeline's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from stagepatch import models
from stagepatch.errors import UserError
from stagepatch.files import read_json, read_tensors, write_tensors

BUNDLED = {"digits": Path(__file__).parent.parent / "assets" / "digits-dit"}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_denoiser(source: str | Path) -> tuple[nn.Module, Any]:
    """The denoiser of a model directory, in eval mode on the CPU, and its scheduler.

    Args:
        source: a directory with `transformer/` (or `unet/`) and `scheduler/`, or 'digits', the bundled model.

    Raises:
        UserError: no such directory, files missing, truncated or foreign, or an unknown class.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if not directory.is_dir():
        raise UserError(f"No model at '{source}': give a model directory, or one of: {', '.join(BUNDLED)}.")
    for component in ("transformer", "unet"):
        if (directory / component).is_dir():
            model = _load_model(directory / component)
            model.register_to_config(_name_or_path=str(source))
            return model, _load_scheduler(directory / "scheduler")
    raise UserError(f"'{directory}' has neither 'transformer/' nor 'unet/': it is not a model directory.")


def save_denoiser(model: Any, scheduler: Any, directory: str | Path) -> None:
    """Write `transformer/` and `scheduler/`; the weights' file is whole or absent."""
    directory = Path(directory)
    component = directory / "transformer"
    component.mkdir(parents=True, exist_ok=True)
    model.save_config(component)
    write_tensors(component / _WEIGHTS, model.state_dict())
    scheduler.save_pretrained(directory / "scheduler")


def _load_model(directory: Path) -> Any:
    config = read_json(directory / "config.json")
    name = str(config.get("_class_name"))
    model_class: Any = getattr(models, name, None) or getattr(diffusers, name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, ModelMixin)
    if not is_model:
        raise UserError(f"'{directory / 'config.json'}' names the class '{name}', which is no model known here.")
    tensors, _ = read_tensors(directory / _WEIGHTS)
    model: Any = model_class.from_config(config)
    expected = model.state_dict()
    odd = sorted(set(expected) ^ set(tensors)) or sorted(
        key for key in expected if expected[key].shape != tensors[key].shape
    )
    if odd:
        raise UserError(
            f"'{directory / _WEIGHTS}' does not hold the {name} that its config.json describes: {len(odd)} tensors "
            f"differ, first '{odd[0]}'."
        )
    model.load_state_dict(tensors)
    return model.eval()


def _load_scheduler(directory: Path) -> Any:
    config = read_json(directory / "scheduler_config.json")
    scheduler_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise UserError(f"'{directory}' names the scheduler '{config.get('_class_name')}', which diffusers lacks.")
    return scheduler_class.from_config(config)
