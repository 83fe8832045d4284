"""Encode images and captions once."""

from pathlib import Path

import torch

from stagepatch.checkpoints import build_denoiser, has_vae
from stagepatch.cli import config as configs
from stagepatch.cli.common import say, write_run_config
from stagepatch.core import UserError, alone_in, processes
from stagepatch.data import make_cache, open_cache
from stagepatch.families import takes_text


def cache(config: configs.CacheConfig, resolved: str) -> None:
    """Encode images and captions once."""
    directory = Path(config.output_dir)
    if not config.model or not (has_vae(config.model) or takes_text(build_denoiser(config.model))):
        raise UserError(
            f"model='{config.model}' has no VAE and takes no captions, so there is nothing to cache: give another."
        )
    dtype = getattr(torch, config.dtype)
    with alone_in(directory):
        make_cache(directory, config.model, config.data, config.batch_size, dtype, dtype)
        if processes().is_main_process:
            write_run_config(directory, resolved)
    say(f"The cache of {len(open_cache(directory, config.data)):,} images is in '{directory}'.")
