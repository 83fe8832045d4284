"""A model's cache of a data config: its parts loaded one after the other, each freed before the next."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from stagepatch.checkpoints import (
    build_denoiser,
    encoder_directories,
    has_vae,
    image_encoder_directories,
    load_captioner,
    load_image_embedder,
    load_vae,
    takes_captions,
    temporal_factor,
)
from stagepatch.core import UserError, processes
from stagepatch.data.cache_dataset import CachedLatents
from stagepatch.data.cache_writer import Reads, build_cache, cache_key
from stagepatch.data.config import IMAGE_SIZE, DataConfig, SourceConfig
from stagepatch.data.dataset import BUNDLED, ImageDataset, load_dataset, open_source
from stagepatch.data.held_out import hold_out
from stagepatch.data.images import Images
from stagepatch.data.mixture import Mixture, check_alike, split_sources
from stagepatch.data.source import Source
from stagepatch.data.video import Clips, VideoFolder
from stagepatch.families import takes_image_embeds, takes_text, takes_videos
from stagepatch.families.registry import family_of

# What of a data config decides the latents.
_PREPROCESSING = ("image_size", "channels", "crop", "bucket_step", "caption_column", "label_column")
_OF_VIDEOS = ("num_frames", "fps", "num_clips")


def fit_to_model(data: DataConfig, model: str, denoiser: Any = None) -> DataConfig:
    """A data config whose images have the channels and the size that a model's have, where it leaves them open.

    Args:
        model: a model directory, a Hub id, or the name of a bundled model.
        denoiser: one in pixels that is there already, in place of `model`.

    Raises:
        UserError: other channels than the model takes.
    """
    if data.source in BUNDLED or (denoiser is None and has_vae(model)):  # bundled ones are what they are
        return replace(data, channels=data.channels or 3, image_size=data.image_size or IMAGE_SIZE)
    config = (build_denoiser(model) if denoiser is None else denoiser).config
    channels = int(config["in_channels"])
    if channels not in (1, 3):
        raise UserError(
            f"The model '{model}' takes {channels} channels, which are no image's: it is of latents, and needs its "
            f"VAE beside it, in 'vae/'."
        )
    if data.channels not in (0, channels):
        raise UserError(f"data.channels={data.channels}, but the model takes {channels}: leave it out.")
    size = config.get("sample_size") or IMAGE_SIZE
    size = size if isinstance(size, int) else max(size)
    return replace(data, channels=channels, image_size=data.image_size or size)


def check_channels(dataset: Any, in_channels: int, data: DataConfig) -> None:
    """Refuse images in pixels that a denoiser does not take.

    Raises:
        UserError: they have other channels.
    """
    channels = dataset[0]["image"].shape[0]
    if channels != in_channels:
        raise UserError(
            f"The images of '{data.source}' have {channels} channel(s), but the model takes {in_channels}: choose "
            f"other data, or another model."
        )


def make_cache(
    directory: Path,
    model: str,
    data: DataConfig,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.float32,
) -> None:
    """Make the cache of images or videos and captions for a model, or check the one that is there.

    A model of captions without a VAE (DeepFloyd IF) has pixels in it.

    A whole cache is only compared with its key: neither images nor encoders are loaded. Of several data sets each has
    a cache of its own in the directory, which is found again when it is trained on beside others.

    Args:
        dtype: that the VAE computes in.
        text_dtype: that text encoders, which may be larger than the denoiser, are loaded in.

    Raises:
        UserError: the directory holds the cache of something else, the model does not take so many frames, or data
            sets do not go together.
    """
    if data.sources:
        configs = split_sources(data)
        check_alike([open_source(each) for each in configs], [each.source for each in configs])
        for named, each in zip(data.sources, configs, strict=True):
            make_cache(directory / cache_name(named), model, each, batch_size, dtype, text_dtype)
        return
    if data.num_frames > 1:
        _check_num_frames(model, data.num_frames)
    if data.source in BUNDLED:
        height, width = load_dataset(data)[0]["image"].shape[1:]
        raise UserError(
            f"The bundled {data.source} images are {height}×{width} pixels and need no VAE: "
            f"set data.source to images for this model."
        )
    data = fit_to_model(data, model)
    source = open_source(data)
    names = (*_PREPROCESSING, *_OF_VIDEOS) if data.num_frames > 1 else _PREPROCESSING
    preprocessing = {name: getattr(data, name) for name in names}
    reads = _what_is_read(model, source, data)
    encoders, device = encoder_directories(model), processes().device
    encoders |= image_encoder_directories(model) if reads == "image" else {}

    def load_reader() -> Any:
        if reads == "image":
            return load_image_embedder(model, device, text_dtype)
        return load_captioner(model, device, text_dtype, reads == "references", reads == "captions and image")

    if data.tags.variants > 1:  # else as in caches of before there were any
        preprocessing["tags"] = asdict(data.tags)
    key = cache_key(source.stamp(), preprocessing, encoders)
    build_cache(
        directory,
        key,
        lambda: Clips(source, data) if isinstance(source, VideoFolder) else Images(source, data),
        lambda: load_vae(model, dtype).to(device) if has_vae(model) else None,
        load_reader if reads == "image" or takes_captions(model) else None,
        batch_size,
        reads,
        family_of(type(build_denoiser(model))).has_blank_reference,
    )


def _what_is_read(model: str, source: Source, data: DataConfig) -> Reads:
    """What conditions are made of.

    Raises:
        UserError: the model does not take references that images have, or pictures are mirrored that are read.
    """
    shape = build_denoiser(model)
    family = family_of(type(shape))
    if takes_image_embeds(shape) and data.horizontal_flip:
        raise UserError(
            f"'{model}' is told embeddings of the pictures, which are made once, as they are: leave out "
            f"data.horizontal_flip."
        )
    if family.reads_image and data.horizontal_flip:
        raise UserError(
            f"'{model}' is told captions together with what is read off the pictures, once, as they are: leave out "
            f"data.horizontal_flip."
        )
    if not source.references(0):
        if family.reads_image:
            return "captions and image"
        return "image" if takes_image_embeds(shape) else "captions"
    if not family.takes_references:
        raise UserError(
            f"The images of '{data.source}' are edits of pictures, which {family.model_class} does not take in "
            f"training: train one that edits (docs/data.md), or move these pictures away."
        )
    if family.encode_edits is None:
        return "captions"
    if data.horizontal_flip:
        raise UserError(
            f"'{model}' reads captions together with the pictures to edit, which are read once, as they are: leave "
            f"out data.horizontal_flip."
        )
    return "references"


def _check_num_frames(model: str, num_frames: int) -> None:
    if not takes_videos(build_denoiser(model)):
        raise UserError(f"data.num_frames={num_frames}, but '{model}' is no model of videos: leave it at 1.")
    factor = temporal_factor(model)
    if over := (num_frames - 1) % factor:
        fitting = [str(count) for count in (num_frames - over, num_frames - over + factor) if count > 1]
        raise UserError(
            f"data.num_frames={num_frames}, but the VAE of '{model}' takes {factor}·k + 1 frames: give "
            f"{' or '.join(fitting)}."
        )


def cache_directory(cache: str, output_dir: str) -> Path:
    """Where a command's cache is: as given, or 'cache' in its output_dir."""
    return Path(cache or Path(output_dir) / "cache")


def load_training_data(
    model: str,
    data: DataConfig,
    cache: str = "",
    output_dir: str = "",
    batch_size: int = 8,
    text_dtype: torch.dtype = torch.float32,
) -> Dataset[dict[str, Any]]:
    """Items as `training.draws.draw` takes them: of a model with a VAE, or of text, its cache, made first if it is not
    there.

    Without those that `data.held_out` holds out, which are the `held_out` of what is returned, and cached too.

    Args:
        model: empty for images in pixels.
    """
    if not model or (not has_vae(model) and not takes_text(build_denoiser(model))):
        dataset: Any = load_dataset(fit_to_model(data, model) if model else data, decode=True)
        if isinstance(dataset, ImageDataset):  # bundled: they have a split of their own
            return dataset
    else:
        directory = cache_directory(cache, output_dir)
        make_cache(directory, model, data, batch_size, text_dtype=text_dtype)
        dataset = open_cache(directory, data)
    return hold_out(dataset, dataset.keys(), data.held_out) if data.held_out else dataset


def open_cache(directory: Path, data: DataConfig) -> CachedLatents | Mixture:
    """What `make_cache` made of a data config.

    Raises:
        UserError: it is not whole, or not there.
    """
    if not data.sources:
        return CachedLatents(directory)
    return Mixture([CachedLatents(directory / cache_name(each)) for each in data.sources], data)


def cache_name(source: SourceConfig) -> str:
    """Of the directory of one of several data sets' cache, whatever the others and its repeats are."""
    what = [source.source, source.masks, *([source.references] if source.references else [])]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return f"{Path(source.source).name}-{digest[:8]}"
