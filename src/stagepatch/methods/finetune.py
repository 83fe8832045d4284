"""Training the model's own weights: all of them, biases and norms alone, or none."""

from pathlib import Path
from typing import Any

from torch import nn

from stagepatch.checkpoints import has_plain_weights, load_denoiser, save_denoiser
from stagepatch.core import UserError, read_tensors, write_tensors
from stagepatch.methods.base import Method

WEIGHTS_NAME = "weights.safetensors"
_NORMS = ("LayerNorm", "GroupNorm", "RMSNorm", "BatchNorm2d")


class Finetune(Method):
    """Trains every weight.

    The model stays in eval mode: the loop drops labels itself, once per sample, so that no module does it again.

    Args:
        scheduler: save a whole model directory, with this scheduler beside it; by default what was trained is saved
            alone, as values rather than differences, so that loading is exact.
    """

    name = "finetune"
    kind = "weights"
    marker = WEIGHTS_NAME

    def __init__(self, scheduler: Any = None) -> None:
        self.scheduler = scheduler
        self.model: nn.Module
        self.trained: list[str] = []

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        if not has_plain_weights(model):
            raise UserError(f"method='{self.name}' trains the model's own weights, and these are quantised.")
        self.model = model.requires_grad_(False).eval()
        chosen = self._choose(model)
        self.trained = list(chosen)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return [{"params": list(chosen.values()), "factor": 1.0}]

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    def save(self, directory: Path) -> None:
        if self.scheduler is not None:
            save_denoiser(self.model, self.scheduler, directory)
            return
        parameters = dict(self.model.named_parameters())
        write_tensors(directory / WEIGHTS_NAME, {name: parameters[name] for name in self.trained})

    def load(self, model: nn.Module, directory: Path) -> None:
        """See `Method`.

        Raises:
            UserError: no such file, a model that is quantised, or one without these parameters.
        """
        path = directory / WEIGHTS_NAME
        if not has_plain_weights(model):
            raise UserError(f"'{path}' are weights for a model that is not quantised: load it without memory.*.")
        if self.scheduler is None or path.exists():
            tensors, _ = read_tensors(path)
        else:
            tensors = dict(load_denoiser(directory)[0].named_parameters())
        parameters = dict(model.named_parameters())
        for name, value in tensors.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise UserError(f"'{path}' is of another model: it holds '{name}' of shape {list(value.shape)}.")
        for name, value in tensors.items():
            parameters[name].data.copy_(value.data)
        self.model = model


class BitFit(Finetune):
    """Trains biases, and the scales of norms, alone (arXiv 2106.10199)."""

    name = "bitfit"

    def _choose(self, model: nn.Module) -> dict[str, nn.Parameter]:
        norms = [path for path, module in model.named_modules() if type(module).__name__.endswith(_NORMS)]
        chosen = {f"{path}.weight" for path in norms}
        named = model.named_parameters()
        return {name: parameter for name, parameter in named if name.endswith("bias") or name in chosen}


class Untrained(Finetune):
    """The base model itself, as a row to compare with: trains nothing and saves nothing."""

    name = "none"

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        return []

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, model: nn.Module, directory: Path) -> None:
        return None
