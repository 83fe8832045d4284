"""Where the parts of a model lie, in a directory laid out as diffusers lays out a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stagepatch.core import TensorReader, UserError

BUNDLED = {"digits": Path(__file__).parent.parent / "assets" / "digits-dit"}
DENOISERS = ("transformer", "unet")
TEXT_PARTS = [f"{part}{ending}" for part in ("text_encoder", "tokenizer") for ending in ("", "_2", "_3")]


def find_model(source: str | Path, parts: Sequence[str] = (*DENOISERS, "scheduler")) -> Path:
    """The directory of a model.

    Args:
        source: a directory, 'digits' (the bundled model), or a Hub id such as 'name/model'.
        parts: subdirectories to fetch where it is on the Hub.

    Raises:
        UserError: nothing there.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if directory.is_dir():
        return directory
    is_hub_id = str(source).count("/") == 1 and not str(source).startswith((".", "/", "~"))
    if not is_hub_id:
        raise UserError(f"No model at '{source}': give a model directory, a Hub id, or one of: {', '.join(BUNDLED)}.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # a dozen kinds, from HTTP to a missing cache
        raise UserError(
            f"No model at '{source}': no such directory, and the Hub does not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})."
        ) from error


def denoiser_directory(directory: Path) -> Path:
    """The part of a model directory that is the denoiser: 'transformer/' or 'unet/'.

    Raises:
        UserError: it has neither.
    """
    for component in DENOISERS:
        if (directory / component).is_dir():
            return directory / component
    raise UserError(f"'{directory}' has neither 'transformer/' nor 'unet/': it is not a model directory.")


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
    return (find_model(source, (*DENOISERS, "scheduler", "vae")) / "vae").is_dir()


def encoder_directories(source: str | Path) -> dict[str, Path]:
    """Directories of VAE, text encoders and tokenizers, by name."""
    directory = find_model(source, ["vae", *TEXT_PARTS])
    names = ("text_encoder*", "tokenizer*", "vae*")
    return {path.name: path for name in names for path in sorted(directory.glob(name)) if path.is_dir()}
