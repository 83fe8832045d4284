"""A model's cache of a data config: its parts loaded one after the other, each freed before the next."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from stagepatch.checkpoints import encoder_directories, has_vae, load_captioner, load_vae, takes_captions
from stagepatch.core import UserError, processes
from stagepatch.data.cache_dataset import CachedLatents
from stagepatch.data.cache_writer import build_cache, cache_key
from stagepatch.data.config import DataConfig
from stagepatch.data.dataset import BUNDLED, load_dataset, open_source
from stagepatch.data.images import Images

# What of a data config decides the latents.
_PREPROCESSING = ("image_size", "channels", "crop", "bucket_step", "caption_column", "label_column")


def make_cache(
    directory: Path, model: str, data: DataConfig, batch_size: int = 8, dtype: torch.dtype = torch.float32
) -> None:
    """Make the cache of images and captions for a model with a VAE, or check the one that is there.

    A whole cache is only compared with its key: neither images nor encoders are loaded.

    Raises:
        UserError: the directory holds the cache of something else.
    """
    if data.source in BUNDLED:
        height, width = load_dataset(data)[0]["image"].shape[1:]
        raise UserError(
            f"The bundled {data.source} images are {height}×{width} pixels and need no VAE: "
            f"set data.source to images for this model."
        )
    source = open_source(data)
    preprocessing = {name: getattr(data, name) for name in _PREPROCESSING}
    key = cache_key(source.stamp(), preprocessing, encoder_directories(model))
    device = processes().device
    build_cache(
        directory,
        key,
        lambda: Images(source, data),
        lambda: load_vae(model).to(device, dtype),
        (lambda: load_captioner(model, device, dtype)) if takes_captions(model) else None,
        batch_size,
    )


def cache_directory(cache: str, output_dir: str) -> Path:
    """Where a command's cache is: as given, or 'cache' in its output_dir."""
    return Path(cache or Path(output_dir) / "cache")


def load_training_data(
    model: str, data: DataConfig, cache: str = "", output_dir: str = "", batch_size: int = 8
) -> Dataset[dict[str, Any]]:
    """Items as `training.draws.draw` takes them: of a model with a VAE its cache, made first if it is not there.

    Args:
        model: empty for images in pixels.
    """
    if not model or not has_vae(model):
        return load_dataset(data)
    directory = cache_directory(cache, output_dir)
    make_cache(directory, model, data, batch_size)
    return CachedLatents(directory)
