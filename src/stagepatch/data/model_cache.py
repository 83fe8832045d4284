"""A model's cache of a data config: its parts loaded one after the other, each freed before the next."""

from __future__ import annotations

from pathlib import Path

import torch

from stagepatch.checkpoints import encoder_directories, load_captioner, load_vae, takes_captions
from stagepatch.core.errors import UserError
from stagepatch.core.processes import processes
from stagepatch.core.progress import progress_bar
from stagepatch.data.cache_writer import INDEX_NAME, build_cache, cache_key, check_key
from stagepatch.data.config import DataConfig
from stagepatch.data.dataset import open_source
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
    if data.source == "digits":
        raise UserError("The digits are 8×8 pixels and need no VAE: set data.source to images for this model.")
    source = open_source(data)
    preprocessing = {name: getattr(data, name) for name in _PREPROCESSING}
    key = cache_key(source.stamp(), preprocessing, encoder_directories(model))
    if (directory / INDEX_NAME).exists():
        check_key(directory, key)
        return
    device = processes().device
    images = Images(source, data)
    captions = len({*images.captions(), ""}) if takes_captions(model) else 0
    with progress_bar(disable=not processes().is_main_process) as progress:
        tasks = [progress.add_task("images", total=len(images), status="")]
        if captions:
            tasks.append(progress.add_task("captions", total=captions, status=""))
        build_cache(
            directory,
            images,
            key,
            lambda: load_vae(model).to(device, dtype),
            (lambda: load_captioner(model, device, dtype)) if captions else None,
            batch_size,
            lambda count: progress.advance(tasks[0], count),
            lambda count: progress.advance(tasks[-1], count),
        )
