"""LoRAs of any origin that a pipeline has loaded, each on in a range of timesteps alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from stagepatch.checkpoints import is_hub_id, load_lora
from stagepatch.core import UserError, as_user_error, read_yaml, write_text
from stagepatch.diffusion import check_tells_timesteps
from stagepatch.families import find_denoiser
from stagepatch.families.registry import NUM_TIMESTEPS, family_of
from stagepatch.sampling.experts_file import NUMBER, TEXT, check_keys

_KEYS = {"file": TEXT, "from": NUMBER, "to": NUMBER, "weight": NUMBER}


@dataclass(frozen=True)
class LimitedLoRA:
    """An adapter that counts at timesteps start ≤ t < end; pure noise is within an end of 1000.

    Args:
        name: of the adapter, as `pipe.load_lora_weights(…, adapter_name=name)` called it; in a file, where it lies.
        start, end: as the model is told them, on a scale of 0, an image, to 1000, noise.
        weight: factor on it.

    Raises:
        UserError: an empty range, or one beyond 0 to 1000.
    """

    name: str
    start: float = 0.0
    end: float = NUM_TIMESTEPS
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.end <= NUM_TIMESTEPS:
            raise UserError(
                f"The range of '{self.name}' is {self.start:g} to {self.end:g}: `from` must be less than `to`, both "
                f"within 0, an image, to 1000, noise."
            )

    def acts_at(self, timestep: float) -> bool:
        """Whether it is on."""
        return self.start <= timestep and (timestep < self.end or self.end == NUM_TIMESTEPS)


class LimitedLoRAs(AbstractContextManager["LimitedLoRAs"]):
    """Switches adapters on and off as the timestep goes; ranges may overlap, and leave gaps, where the base is alone.

        pipe.load_lora_weights("style.safetensors", adapter_name="style")
        pipe.load_lora_weights("detail.safetensors", adapter_name="detail")
        LimitedLoRAs(pipe, [LimitedLoRA("style", 500, 1000), LimitedLoRA("detail", 0, 500, weight=0.8)])

    `detach()`, or the end of a `with` block, leaves the adapters as they were. What a LoRA did to text encoders is not
    limited: these do not see a timestep.

    Args:
        target: a pipeline, or its denoiser.
        component: the denoiser's name in a pipeline that has several.

    Raises:
        UserError: an adapter that is not loaded.
    """

    def __init__(self, target: Any, loras: Sequence[LimitedLoRA], component: str = "") -> None:
        self.loras = list(loras)
        self._model: Any = find_denoiser(target, component)
        loaded = list(getattr(self._model, "peft_config", {}))
        for lora in self.loras:
            if lora.name not in loaded:
                raise UserError(
                    f"No adapter '{lora.name}' is loaded: {', '.join(loaded) or 'none is'}. Load it with "
                    f"pipe.load_lora_weights(…, adapter_name='{lora.name}')."
                )
        layers: list[Any] = [part for part in self._model.modules() if hasattr(part, "lora_A")] if loaded else []
        self._before: list[str] = list(self._active_adapters()) if loaded else []
        self._were_off = any(layer.disable_adapters for layer in layers)
        self._scales = [(layer.scaling, dict(layer.scaling)) for layer in layers]
        family = family_of(type(self._model))
        self._levels, self._timestep = family.sample_levels, family.timestep_argument
        self._names = list(inspect.signature(self._model.forward).parameters)
        self._active: list[LimitedLoRA] | None = None
        self._handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _active_adapters(self) -> Any:
        return self._model.active_adapters()

    def detach(self) -> None:
        """Switch on what was on before; further calls do nothing."""
        if self._active is not None:
            self._model.enable_adapters()
            self._model.set_adapters(self._before)
            for scaling, before in self._scales:
                scaling.update(before)
            if self._were_off:
                self._model.disable_adapters()
        self._active = None
        self._handle.remove()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = (dict(zip(self._names, args, strict=False)) | kwargs).get(self._timestep)
        if timestep is None:
            return  # the model will say itself what it misses
        # Rounded, since float32 loses some digits where a model takes timesteps divided by 1000.
        levels = self._levels(torch.as_tensor(timestep).detach().cpu().double())
        chosen = [[lora for lora in self.loras if lora.acts_at(told)] for told in _rounded(levels)]
        if any(other != chosen[0] for other in chosen):
            raise UserError("Samples of one call lie in ranges of different LoRAs: call the model with one timestep.")
        if chosen[0] != self._active:
            self._switch(chosen[0])

    def _switch(self, active: list[LimitedLoRA]) -> None:
        if not active:
            self._model.disable_adapters()
        else:
            self._model.enable_adapters()
            self._model.set_adapters([lora.name for lora in active], [lora.weight for lora in active])
        self._active = active


def _rounded(levels: torch.Tensor) -> list[float]:
    found: list[float] = (levels * NUM_TIMESTEPS).round(decimals=3).tolist()
    return found


def read_limited_loras(path: Path) -> list[LimitedLoRA]:
    """The LoRAs of a file, which are not loaded: the name of each is where it lies.

    Raises:
        UserError: no such file, or what the mistake in it is.
    """
    content = read_yaml(path, "schedule")
    with as_user_error(f"'{path}'", UserError):
        entries = check_keys(content, {"loras": "a list of at least one entry"}, "the file", "loras")["loras"]
        loras = []
        for number, entry in enumerate(entries, 1):
            given = check_keys(entry, _KEYS, f"LoRA {number}", "file", "from", "to")
            own = Path(path.parent, given["file"])
            place = str(own.resolve()) if own.exists() else given["file"]
            loras.append(LimitedLoRA(place, given["from"], given["to"], given.get("weight", 1.0)))
        return loras


def load_limited_loras(path: str | Path, pipe: Any, component: str = "") -> LimitedLoRAs:
    """Load the LoRAs of a file into a pipeline, by its own loader, and limit each to its range; see docs/experts.md.

    Raises:
        UserError: no such file, a mistake in it, or a LoRA that the pipeline does not load.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"'{path}' is of LoRAs for a pipeline that loads them: {type(pipe).__name__} does not.")
    check_tells_timesteps(pipe.scheduler, f"'{path}'")
    named = []
    for number, lora in enumerate(read_limited_loras(Path(path))):
        name = f"stage_{number}"
        if not Path(lora.name).exists() and not is_hub_id(lora.name):
            raise UserError(f"No LoRA at '{lora.name}': give a file, a directory or a Hub id.")
        with as_user_error(f"The LoRA '{lora.name}' cannot be loaded", Exception):  # a dozen kinds, HTTP's among them
            load_lora(pipe, lora.name, name)
        named.append(LimitedLoRA(name, lora.start, lora.end, lora.weight))
    return LimitedLoRAs(pipe, named, component)


def write_limited_loras(path: Path, loras: Sequence[LimitedLoRA]) -> None:
    """Write the file that `load_limited_loras` reads; a file beside it by its name, other local ones by their whole
    paths.
    """
    entries = []
    for lora in loras:
        place = Path(lora.name).resolve()
        near = place.name if place.parent == path.parent.resolve() else str(place)
        file = near if place.exists() else lora.name
        entries.append({"file": file, "from": lora.start, "to": lora.end, "weight": lora.weight})
    text = yaml.safe_dump({"loras": entries}, sort_keys=False, default_flow_style=None, allow_unicode=True)
    write_text(path, text)
