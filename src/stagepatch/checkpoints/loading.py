"""A model's parts out of a directory laid out as diffusers lays out a pipeline, or out of the Hub."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor

from stagepatch import models
from stagepatch.checkpoints.hub import pinned
from stagepatch.checkpoints.layout import (
    DENOISERS,
    SECOND,
    VAES,
    component_for,
    denoiser_directory,
    denoiser_ranges,
    find_model,
    vae_directory,
)
from stagepatch.checkpoints.memory import check_available, hold, load_gguf, quantization_of
from stagepatch.checkpoints.memory_config import MemoryConfig
from stagepatch.checkpoints.projection import PROJECTION, add_projections
from stagepatch.checkpoints.routing import WINDOWS, attach_routing
from stagepatch.core import TensorReader, UserError, as_user_error, read_json, read_tensors, write_tensors, write_text
from stagepatch.families.registry import Family, family_of

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# What libraries raise on files that they cannot load.
UNLOADABLE: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, RuntimeError, TypeError, AttributeError)
UNLOADABLE += (LookupError, UnpicklingError, SafetensorError)
_MOST = {"layers": 1000, "num_train_timesteps": 10**6}  # in a config: what makes more is not built
# While it loads, diffusers replaces how torch makes parameters, for all threads: two at once would leave it so.
_ONE_AT_A_TIME = Lock()


def load_denoiser(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    component: str = "",
    memory: MemoryConfig | None = None,
) -> tuple[Any, Any]:
    """The denoiser of a model, in eval mode on the CPU, and its scheduler.

    Args:
        source: see `find_model`; with `transformer/` (or `unet/`) and `scheduler/`.
        dtype: of its weights, but for those that its class keeps in float32. They are read in it: there is no moment
            with two copies.
        component: the denoiser's name, in a model that has several.
        memory: how it is held, if it is to stay frozen.

    Raises:
        UserError: no such directory, files missing, truncated or foreign, an unknown class, several denoisers and none
            is named, or a way to hold it that cannot be had.
    """
    directory = find_model(source)
    if not component and len(ranges := denoiser_ranges(directory)) > 1:
        each = " and ".join(f"{name} (noise {low:g} to {high:g})" for name, (low, high) in ranges.items())
        raise UserError(
            f"'{source}' has several denoisers, {each}: name one with `component`. `stagepatch train` and `stagepatch "
            f"sample` take such a model whole; other commands do not know of them."
        )
    model = _load_model(denoiser_directory(directory, component), dtype, memory)
    model.register_to_config(_name_or_path=pinned(source))
    return model, load_scheduler(directory)


def load_scheduler(source: str | Path) -> Any:
    """The scheduler of a model.

    Raises:
        UserError: there is none, or of a class that diffusers lacks.
    """
    directory = find_model(source) / "scheduler"
    config = read_json(directory / "scheduler_config.json")
    scheduler_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise UserError(f"'{directory}' names the scheduler '{config.get('_class_name')}', which diffusers lacks.")
    _check_most(directory / "scheduler_config.json", config)
    with as_user_error(f"'{directory}' describes no {scheduler_class.__name__}", *UNLOADABLE, ArithmeticError):
        return scheduler_class.from_config(config)


def build_denoiser(source: str | Path, component: str = "") -> Any:
    """The denoiser of a model on the meta device: its shape without its weights."""
    return _shape(denoiser_directory(find_model(source), component))


def load_vae(source: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model's VAE, frozen, in eval mode. Statistics of cells are in order of channels and then of pixels."""
    directory = find_model(source, VAES)
    vae = _load_model(vae_directory(directory), dtype).requires_grad_(False)
    if type(vae).__name__ == "AutoencoderKLHunyuanVideo15":
        vae.enable_slicing()  # diffusers' mask for its attention fits one video alone
    family = _family_of_pipeline(directory)
    if family is not None and family.is_scaled_by_statistics:
        vae.register_to_config(scaling_factor=1.0)
    if family is not None and family.is_pixel_by_pixel:
        for statistics in (vae.bn.running_mean, vae.bn.running_var):
            statistics.copy_(statistics.view(4, -1).T.flatten())
    return vae


def temporal_factor(source: str | Path) -> int:
    """Frames of a video that one of its latents stands for; the first stands for one, so k·factor + 1 make k + 1.

    Raises:
        UserError: its config does not say, as that of a VAE of images.
    """
    directory = vae_directory(find_model(source, VAES))
    vae_class: Any = class_of(directory)
    with torch.device("meta"):
        vae = vae_class.from_config(read_json(directory / "config.json"))
    names = ("scale_factor_temporal", "temporal_compression_ratio")
    factor = next((found for name in names if (found := vae.config.get(name) or vars(vae).get(name))), None)
    if factor is None:
        raise UserError(f"The VAE in '{directory}' does not say how many frames its latents stand for.")
    return int(factor)


def _family_of_pipeline(directory: Path) -> Family | None:
    """That of the transformer that a whole pipeline names."""
    index = directory / "model_index.json"
    named = (read_json(index) if index.exists() else {}).get("transformer")
    model_class = getattr(diffusers, str(named[-1]), None) if isinstance(named, list) and named else None
    return None if model_class is None else family_of(model_class)


def load_pipeline(source: str | Path, memory: MemoryConfig | None = None, **options: Any) -> Any:
    """The whole pipeline.

    Args:
        memory: how its denoisers are held, if they are to stay frozen.
        options: of diffusers' `from_pretrained`.

    Raises:
        UserError: it cannot be loaded.
    """
    directory, memory = find_model(source, ["*"]), memory or MemoryConfig()
    if not (directory / "model_index.json").exists():
        raise UserError(f"'{directory}' is no whole pipeline: it has no model_index.json.")
    _check_runs_no_code(directory)
    denoisers = [name for name in (*DENOISERS, SECOND) if (directory / name).is_dir()]
    if memory.gguf and len(denoisers) > 1:
        raise UserError(f"memory.gguf='{memory.gguf}' is one denoiser; '{source}' has {', '.join(denoisers)}.")
    for name in denoisers:
        if name not in options and (memory != MemoryConfig() or _holds_own_parts(directory / name)):
            options[name] = _load_model(directory / name, options.get("torch_dtype") or torch.float32, memory)
    with _ONE_AT_A_TIME, as_user_error(f"The pipeline in '{directory}' cannot be loaded", *UNLOADABLE):
        return diffusers.DiffusionPipeline.from_pretrained(directory, **options)


def _check_runs_no_code(directory: Path) -> None:
    """Refuse a pipeline that names Python files of its own, which diffusers of before 0.37 would run.

    Raises:
        UserError: it does.
    """
    index = read_json(directory / "model_index.json")
    named = {name: value[0] for name, value in index.items() if isinstance(value, list) and value}
    for name, module in named.items():
        folder = directory if name == "_class_name" else directory / name
        if (folder / f"{module}.py").is_file():
            raise UserError(
                f"The pipeline in '{directory}' wants to run code of its own, '{folder / module}.py', which is never "
                f"done here. Load it yourself, if you trust it, and give `Patch.attach` the pipeline."
            )


def save_config(model: Any, directory: Path) -> None:
    """Write what the model is, without its weights, as `save_denoiser` does."""
    _write_config(model, directory / component_for(model))


def save_denoiser(model: Any, scheduler: Any, directory: str | Path) -> None:
    """Write `transformer/` (a U-Net: `unet/`) and `scheduler/`, each file whole or absent."""
    directory = Path(directory)
    component = directory / component_for(model)
    _write_config(model, component)
    write_tensors(component / _WEIGHTS, model.state_dict())
    _write_config(scheduler, directory / "scheduler")


def _write_config(part: Any, directory: Path) -> None:
    """What diffusers' `save_config` writes, whole or absent."""
    write_text(directory / part.config_name, part.to_json_string())


def class_of(directory: Path) -> type:
    name = str(read_json(directory / "config.json").get("_class_name"))
    model_class: Any = getattr(models, name, None) or getattr(diffusers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise UserError(f"'{directory / 'config.json'}' names the class '{name}', which is no model known here.")
    return model_class


def family_in(directory: Path) -> Family:
    return family_of(class_of(denoiser_directory(directory)))


def _load_model(directory: Path, dtype: torch.dtype = torch.float32, memory: MemoryConfig | None = None) -> Any:
    memory = memory or MemoryConfig()
    check_available(memory)
    model_class: Any = class_of(directory)
    if memory.gguf:
        with _ONE_AT_A_TIME:
            return load_gguf(model_class, directory, Path(memory.gguf), dtype)
    is_quantized = "quantization_config" in read_json(directory / "config.json")
    has_other_files = any(directory.glob("diffusion_pytorch_model*")) and not (directory / _WEIGHTS).exists()
    if not is_quantized and not has_other_files and _check_weights(model_class, directory):
        if memory.quantization != "none":
            raise UserError(
                f"'{directory}' holds projections or routing of stagepatch, of which diffusers' quantisation does not "
                f"know: leave memory.quantization out."
            )
        tensors, _ = read_tensors(directory / _WEIGHTS)
        model = _with_own_parts(model_class, directory, tensors)
        model.load_state_dict(tensors)
        return hold(model.eval() if dtype == torch.float32 else model.eval().to(dtype), memory, dtype)
    if _holds_own_parts(directory):
        raise UserError(
            f"'{directory}' holds projections or routing of stagepatch, which are read from '{_WEIGHTS}' alone: save "
            f"the model again with save_denoiser."
        )
    options: dict[str, Any] = {}
    if memory.quantization != "none":
        if is_quantized:
            raise UserError(f"'{directory}' is quantised already: leave memory.quantization out.")
        options["quantization_config"] = quantization_of(memory, dtype, _shape(directory))
    # Several files, or a variant or format that diffusers knows.
    variants = {path.name.split(".")[1] for path in directory.glob("diffusion_pytorch_model.*.safetensors")}
    variant = next((name for name in ("fp16", "bf16") if name in variants), None)
    with _ONE_AT_A_TIME, as_user_error(f"The weights in '{directory}' cannot be loaded", *UNLOADABLE):
        model = model_class.from_pretrained(directory, variant=variant, torch_dtype=dtype, **options)
    return hold(model.eval(), memory, dtype)


def _shape(directory: Path) -> Any:
    """A model of a config on the meta device: its shape without its weights."""
    model_class: Any = class_of(directory)
    with torch.device("meta"):
        return _from_config(model_class, directory)


def _from_config(model_class: Any, directory: Path) -> Any:
    path = directory / "config.json"
    config = read_json(path)
    _check_most(path, config)
    with as_user_error(f"'{path}' describes no {model_class.__name__}", *UNLOADABLE, ArithmeticError):
        return model_class.from_config(config)


def _check_most(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config whose layers or timesteps would take time and memory without end."""
    for name, value in config.items():
        most = next((number for part, number in _MOST.items() if part in name), None)
        if most is not None and isinstance(value, int) and value > most:
            raise UserError(f"'{path}' says {name}={value}: more than {most:,} are not made.")


def _with_own_parts(model_class: Any, directory: Path, tensors: Mapping[str, Tensor]) -> Any:
    """A model of a config with the projections and the routing of tensors, of which diffusers does not know."""
    model = _from_config(model_class, directory)
    with as_user_error(f"'{directory / _WEIGHTS}' holds projections that its model has no place for", *UNLOADABLE):
        projected = [int(name.split(".")[-1]) for name in tensors if name.startswith(f"{PROJECTION}.")]
        if projected:
            add_projections(model, projected)
    if WINDOWS in tensors:
        attach_routing(model, tensors[WINDOWS])
    return model


def _check_weights(model_class: Any, directory: Path) -> bool:
    """See by its header that a file holds what a config describes; returns whether it has parts of ours.

    Raises:
        UserError: it is not there, broken, or of another model.
    """
    reader = TensorReader([directory / _WEIGHTS])
    with torch.device("meta"):
        tensors = {name: torch.empty(reader.shape(name), dtype=reader.dtype(name)) for name in reader.names()}
        model = _with_own_parts(model_class, directory, tensors)
    expected, found = ({(key, value.shape) for key, value in each.items()} for each in (model.state_dict(), tensors))
    odd = sorted({key for key, _ in expected ^ found})
    if odd:
        raise UserError(
            f"'{directory / _WEIGHTS}' does not hold the {model_class.__name__} that its config.json describes: "
            f"{len(odd)} tensors differ, first '{odd[0]}'."
        )
    return _holds_own_parts(directory)


def _holds_own_parts(directory: Path) -> bool:
    """Whether a model's weights hold channel projections or routing, which diffusers' own loading leaves out."""
    paths = directory.glob("diffusion_pytorch_model*.safetensors")
    return any(name.startswith((f"{PROJECTION}.", WINDOWS)) for path in paths for name in TensorReader([path]).names())
