"""What a directory or file holds, decided in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from stagepatch.checkpoints import BUNDLED, DENOISERS, load_denoiser
from stagepatch.core import UserError, read_json, read_yaml
from stagepatch.families import find_denoiser
from stagepatch.methods.base import Method
from stagepatch.methods.config import METHODS, MethodConfig
from stagepatch.methods.table import method_class

STAGE_NAME = "stage.json"
# What a file in a directory says of it, in the order in which they are looked for; methods and models come first.
_MARKERS = {
    "index.safetensors": "cache",
    "plan.json": "unfinished cache",
    "results.json": "comparison",
    "stages": "stages",
    "checkpoint.safetensors": "unfinished run",
    "pytorch_lora_weights.safetensors": "part of a LoRA",
    "wavelet.safetensors": "part of wavelet gates",
    "model.safetensors": "part of a patch",
}
_SUFFIXES = {".safetensors": "tensors", ".pt": "checkpoint", ".pth": "checkpoint", ".bin": "checkpoint"}
_WAYS_OUT = {
    "unfinished": " Give the command that made it again: it goes on where it stopped.",
    "part": " It was killed while it was written, or is not all there: make or fetch it again.",
}


@dataclass(frozen=True)
class Artifact:
    """A directory or file, and what it holds.

    Args:
        kind: 'patch', 'LoRA', 'wavelet gates', 'weights' or 'weights and patch', what a method learned; 'patches of
            several denoisers', of a pipeline; 'model'; 'experts', a YAML file of models by timestep; 'cache';
            'comparison'; 'stages', what `stagepatch decouple` wrote; files: 'tensors' and 'checkpoint'. What is not
            whole is an 'unfinished run' or 'unfinished cache', or 'part of a patch', 'part of a LoRA', 'part of
            wavelet gates' or 'part of a model'.
        method: the class that loads what was learned.
        stage: content of its stage.json, where it is a stage of `stagepatch decouple`.
    """

    path: Path
    kind: str
    method: type[Method] | None = None
    stage: dict[str, Any] = field(default_factory=dict)

    def put_on(self, model: Any, component: str = "") -> Method:
        """Put what a method learned on a model, or on a pipeline's denoiser.

        Args:
            component: the denoiser's name, in a pipeline that has several.

        Raises:
            UserError: it is something else, or of another model.
        """
        if self.method is None:
            holds = "nothing that a method learned: no patch, no LoRA, no weights"
            raise UserError(f"'{self.path}' holds {holds}, but {self.description}")
        method = self.method.from_config(MethodConfig(), {})
        method.load(model if self.method is PerDenoiser else find_denoiser(model, component), self.path)
        return method

    def load(self) -> tuple[Any, Any]:
        """A model and its scheduler; see `load_denoiser`."""
        return load_denoiser(self.path)

    def require(self, *kinds: str) -> Artifact:
        """Itself, if it is of one of some kinds.

        Raises:
            UserError: it is not.
        """
        if self.kind not in kinds:
            wanted = " or ".join(map(_named, kinds))
            raise UserError(f"'{self.path}' does not hold {wanted}, but {self.description}")
        return self

    @property
    def description(self) -> str:
        """What it is, and what to do where it is not whole: a sentence."""
        return f"{_named(self.kind)}.{_WAYS_OUT.get(self.kind.split()[0], '')}"


def open_artifact(path: str | Path, *kinds: str) -> Artifact:
    """What lies at a path.

    Args:
        path: a directory, a file, or the name of a bundled model.
        kinds: that it must be one of; see `Artifact`.

    Raises:
        UserError: nothing is there, nothing that is known here, or something else than `kinds`.
    """
    path = BUNDLED.get(str(path), Path(path))
    if not path.exists():
        raise UserError(f"Nothing at '{path}'.")
    artifact = _open_directory(path) if path.is_dir() else _open_file(path)
    return artifact.require(*kinds) if kinds else artifact


def open_learned(directory: Path) -> Artifact:
    """What a method saved in a directory: a patch, a LoRA, or weights.

    Raises:
        UserError: no such directory, or nothing in it that is known here.
    """
    if not directory.is_dir():
        raise UserError(f"No patch at '{directory}': no such directory.")
    return open_artifact(directory)


def load_learned(model: nn.Module, directory: Path) -> Method:
    """Put on a model what a method saved.

    Raises:
        UserError: see `open_learned`; or it is of another model.
    """
    return open_learned(directory).put_on(model)


class PerDenoiser(Method):
    """Patches, or what else a method learns, by name of the denoiser; read and put on, not trained as one.

    Attributes:
        methods: once loaded, by name.
    """

    name = "per_denoiser"
    kind = "patches of several denoisers"
    marker = "denoisers.json"

    def __init__(self) -> None:
        self.methods: dict[str, Method] = {}

    @staticmethod
    def directory_of(directory: Path, component: str) -> Path:
        """Where a denoiser's own is."""
        return directory / "denoisers" / component

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        raise UserError("A model's several denoisers are trained one after the other: `stagepatch train`.")

    def save(self, directory: Path) -> None:
        for component, method in self.methods.items():
            method.save(self.directory_of(directory, component))

    def load(self, model: Any, directory: Path) -> None:
        """Put each on the denoiser of its name.

        Args:
            model: the whole pipeline.

        Raises:
            UserError: a single model, or a pipeline without one of the denoisers.
        """
        if isinstance(model, nn.Module):
            raise UserError(f"'{directory}' is for several denoisers of a pipeline: give the pipeline, not one model.")
        for component in read_json(directory / self.marker):
            denoiser = find_denoiser(model, component)
            self.methods[component] = open_learned(self.directory_of(directory, component)).put_on(denoiser)


def _open_directory(path: Path) -> Artifact:
    stage = read_json(path / STAGE_NAME) if (path / STAGE_NAME).exists() else {}
    methods: list[type[Method]] = [PerDenoiser, *map(method_class, METHODS)]
    for method in methods:
        if method.is_saved_in(path):
            return Artifact(path, method.kind, method, stage)
    components = [path / name for name in DENOISERS if (path / name).is_dir()]
    if components:
        is_whole = any(components[0].glob("*.safetensors")) or any(components[0].glob("*.bin"))
        has_parts = (components[0] / "config.json").exists() and (path / "scheduler").is_dir()
        return Artifact(path, "model" if is_whole and has_parts else "part of a model", stage=stage)
    for name, kind in _MARKERS.items():
        if (path / name).exists():
            return Artifact(path, kind, stage=stage)
    raise UserError(
        f"'{path}' holds no patch, no LoRA, no weights, and nothing else that is known here: no model, run, cache, "
        f"comparison or stages."
    )


def _open_file(path: Path) -> Artifact:
    if path.suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        if isinstance(content, dict) and {"experts", "loras"} & set(content):
            return Artifact(path, "experts")
    if path.suffix in _SUFFIXES:
        return Artifact(path, _SUFFIXES[path.suffix])
    raise UserError(f"'{path}' is no file of experts, tensors or a checkpoint.")


def _named(kind: str) -> str:
    """A kind for a message."""
    words = {
        "weights": "a model's weights",
        "weights and patch": "a model's weights and a patch",
        "stages": "stages of timesteps",
        "wavelet gates": kind,
        "experts": kind,
        "tensors": kind,
    }
    return words.get(kind, kind if kind.startswith("part") else f"{'an' if kind[0] == 'u' else 'a'} {kind}")
