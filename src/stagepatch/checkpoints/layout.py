"""Where the parts of a model lie, in a directory laid out as diffusers lays out a pipeline."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagepatch.checkpoints.hub import from_hub, is_hub_id
from stagepatch.core import TensorReader, UserError, copy_file, read_json, whole_directory

_ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED = {name: _ASSETS / f"{name}-dit" for name in ("digits", "fashion")}
DENOISERS = ("transformer", "unet")
SECOND = "transformer_2"  # of a model that its makers split by noise level
VAES = ("vae", "movq")  # the latter of Kandinsky 2.2
TEXT_PARTS = [f"{part}{ending}" for part in ("text_encoder", "tokenizer") for ending in ("", "_2", "_3", "_4")]
TEXT_PARTS += ["processor", "connectors"]  # in place of a tokenizer; LTX-2's, behind its text encoder

_OF_DISTILLED = (
    "LCMScheduler",
    "FlowMatchLCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
    "CMStochasticIterativeScheduler",
)


def find_model(source: str | Path, parts: Sequence[str] = (*DENOISERS, SECOND, "scheduler")) -> Path:
    """The directory of a model.

    Args:
        source: a directory, 'digits' or 'fashion' (bundled models), or a Hub id such as 'name/model' or
            'name/model@revision'.
        parts: subdirectories to fetch where it is on the Hub.

    Raises:
        UserError: nothing there.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if directory.is_dir():
        return directory
    if not is_hub_id(source):
        raise UserError(f"No model at '{source}': give a model directory, a Hub id, or one of: {', '.join(BUNDLED)}.")
    return from_hub(source, ["model_index.json", *(f"{part}/*" for part in parts)], "model")


def denoiser_directory(directory: Path, component: str = "") -> Path:
    """The part of a model directory that is the denoiser: 'transformer/' or 'unet/'.

    Args:
        component: its name, in a model that has several; by default the first one's.

    Raises:
        UserError: it has neither, or none of that name.
    """
    found = [name for name in (*DENOISERS, SECOND) if (directory / name).is_dir()]
    if not found:
        raise UserError(f"'{directory}' has neither 'transformer/' nor 'unet/': it is not a model directory.")
    if component and component not in found:
        raise UserError(f"component='{component}' is no denoiser of '{directory}', which has {', '.join(found)}.")
    return directory / (component or found[0])


def denoiser_ranges(source: str | Path) -> dict[str, tuple[float, float]]:
    """A model's denoisers by name, and the noise levels that each is for, from the image on.

    Most have one, for all. Wan 2.2's of 14B have two: `transformer` where the noise level is at least the pipeline's
    `boundary_ratio`, `transformer_2` below.

    Raises:
        UserError: a boundary that is none.
    """
    directory = find_model(source)
    first = denoiser_directory(directory).name
    index = directory / "model_index.json"
    boundary = read_json(index).get("boundary_ratio") if index.exists() else None
    if boundary is None or not (directory / SECOND).is_dir():
        return {first: (0.0, 1.0)}
    if not isinstance(boundary, (int, float)) or not 0.0 <= boundary <= 1.0:
        raise UserError(f"'{index}' says boundary_ratio={boundary!r}: expected a noise level from 0 to 1.")
    return {SECOND: (0.0, float(boundary)), first: (float(boundary), 1.0)}


def component_for(model: Any) -> str:
    """The part of a model directory that a denoiser is saved as."""
    return "unet" if type(model).__name__.startswith("UNet") else "transformer"


def denoiser_reader(directory: Path) -> TensorReader:
    """The weights of a model directory's denoiser.

    Raises:
        UserError: it has none.
    """
    denoiser = denoiser_directory(directory)
    paths = sorted(denoiser.glob("diffusion_pytorch_model*.safetensors"))
    if not paths:
        raise UserError(f"No weights in '{denoiser}': looked for diffusion_pytorch_model*.safetensors.")
    return TensorReader(paths)


def has_vae(source: str | Path) -> bool:
    """Whether the model works on latents."""
    return vae_directory(find_model(source, (*DENOISERS, "scheduler", *VAES))).is_dir()


def vae_directory(directory: Path) -> Path:
    """Where a model directory has its VAE, or would have it."""
    return next((directory / name for name in VAES if (directory / name).is_dir()), directory / "vae")


def is_pipeline(source: str | Path) -> bool:
    """Whether the model is a whole pipeline of diffusers with a VAE or a text encoder, and not parts that lie beside
    each other."""
    index = find_model(source) / "model_index.json"
    if not index.exists():
        return False
    return has_vae(source) or any(name.startswith("text_encoder") for name in read_json(index))


def sign_of_distillation(source: str | Path) -> str:
    """What in a model's files says that it was distilled to few steps or to do without guidance; empty for nothing."""
    directory = find_model(source)
    index, scheduler = directory / "model_index.json", directory / "scheduler" / "scheduler_config.json"
    if index.exists() and read_json(index).get("is_distilled"):
        return "is_distilled in its model_index.json"
    name = str(read_json(scheduler).get("_class_name")) if scheduler.exists() else ""
    return f"its scheduler is {name}" if name in _OF_DISTILLED else ""


def lay_out_encoders(source: str | Path, directory: Path, with_text: bool) -> None:
    """Copy a model's VAE into a directory, where it is not there yet, whole.

    Args:
        with_text: its text encoders and tokenizers too.

    Raises:
        UserError: the model has no VAE.
    """
    encoders = encoder_directories(source)
    if "vae" not in encoders:
        raise UserError(f"'{source}' has no vae/: give a model that works on latents.")
    directory.mkdir(parents=True, exist_ok=True)
    for name, path in encoders.items():
        if (with_text or name == "vae") and not (directory / name).exists():
            with whole_directory(directory / name) as whole:
                shutil.copytree(path, whole, copy_function=copy_file)


def encoder_directories(source: str | Path) -> dict[str, Path]:
    """Directories of VAE, text encoders with what is behind them, tokenizers and processors, by name."""
    directory = find_model(source, [*VAES, *TEXT_PARTS])
    names = ("text_encoder*", "tokenizer*", "processor*", "connectors*", "vae*", "movq*")
    return {path.name: path for name in names for path in sorted(directory.glob(name)) if path.is_dir()}
