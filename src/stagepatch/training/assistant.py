"""An assistant LoRA: on the model while something else is trained, off in pictures, and in nothing that is saved."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stagepatch.checkpoints import component_for, find_model, load_lora, load_pipeline
from stagepatch.core import UserError, as_user_error, read_json

_NAME = "assistant"


class Assistant:
    """Adds a LoRA's maps to what a model's layers put out, by hooks: its weights, names and files stay as they were.

    A model distilled to few steps, or to do without guidance, unlearns that when it is trained by the denoising
    loss. With a LoRA that has unlearned it already, what is trained beside it need not; put on the distilled model
    without the assistant, it leaves the distillation as it was, or nearly.

    Args:
        model: the denoiser, before anything else is put on it.
        source: its pipeline, whose own loader reads the LoRA, of any format that it knows.
        path: of the LoRA: a file, a directory or a Hub id.

    Raises:
        UserError: no whole pipeline, or a LoRA that its loader does not read, or that has nothing for the denoiser.
    """

    def __init__(self, model: Any, source: str, path: str) -> None:
        index = read_json(find_model(source, ["*"]) / "model_index.json")
        absent = dict.fromkeys(name for name, value in index.items() if isinstance(value, list))
        pipe = load_pipeline(source, **{**absent, component_for(model): model})
        if not hasattr(pipe, "load_lora_weights"):
            raise UserError(f"assistant_lora='{path}': {type(pipe).__name__} loads no LoRAs.")
        with as_user_error(f"assistant_lora='{path}' cannot be loaded", Exception):  # a dozen kinds, HTTP's among them
            load_lora(pipe, path, _NAME)
        maps = {
            name: (layer.lora_A[_NAME], layer.lora_B[_NAME], layer.scaling[_NAME])
            for name, layer in model.named_modules()
            if _NAME in getattr(layer, "lora_A", ())
        }
        if not maps:
            raise UserError(f"assistant_lora='{path}' holds nothing for {type(model).__name__}.")
        model.unload_lora()
        self.enabled = False
        for name, (down, up, scale) in maps.items():
            model.get_submodule(name).register_forward_hook(_Added(self, down, up, scale))

    @contextlib.contextmanager
    def set(self, enabled: bool) -> Iterator[None]:
        """On, or off, meanwhile."""
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


class _Added:
    """A hook on one layer."""

    def __init__(self, assistant: Assistant, down: nn.Module, up: nn.Module, scale: float) -> None:
        self.assistant, self.scale = assistant, scale
        self.maps = nn.Sequential(down, up).requires_grad_(False)

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self.assistant.enabled:
            return output
        given = args[0]
        added: Tensor = self.maps.to(given.device, given.dtype)(given)
        return output + self.scale * added
