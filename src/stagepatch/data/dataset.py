"""A data source by name, as a map-style dataset."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.core import UserError
from stagepatch.data.arrays import ArraySource, is_array
from stagepatch.data.config import DataConfig
from stagepatch.data.digits import load_digits
from stagepatch.data.fashion import load_fashion
from stagepatch.data.folder import FolderSource
from stagepatch.data.huggingface import HuggingFaceSource, is_parquet, is_saved_dataset
from stagepatch.data.images import Images
from stagepatch.data.mixture import Mixture, check_alike, split_sources
from stagepatch.data.pixels import decode_once
from stagepatch.data.source import Source
from stagepatch.data.video import VideoFolder
from stagepatch.data.webdataset import WebDatasetSource, find_shards


@dataclass(eq=False)
class ImageDataset(Dataset[dict[str, Any]]):
    """Images [B, C, H, W] in [−1, 1] and labels [B], in memory."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


BUNDLED: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {"digits": load_digits, "fashion": load_fashion}
"""Data that come with the package: splits 'train' and, never trained on, 'held_out'; of 'fashion' also 'tune'."""

Split = Literal["train", "held_out", "tune"]


def load_dataset(config: DataConfig, split: Split = "train", decode: bool = False) -> Dataset[dict[str, Any]]:
    """The dataset that a config names. Only those of BUNDLED have a held-out split.

    Args:
        decode: once, as far as memory allows; see `decode_once`.

    Raises:
        UserError: nothing at the source, no image in it, too many broken ones, no such split, videos are asked for, or
            sources do not go together.
    """
    if config.num_frames > 1:
        raise UserError(
            f"data.num_frames={config.num_frames}: models of videos and latents are trained on clips; here images are "
            f"wanted. Leave it at 1."
        )
    if config.source in BUNDLED:
        if split == "tune" and config.source == "digits":
            raise UserError(
                "The digits have no images to choose by: held_out='tune' is of 'fashion' alone. "
                "Of the digits there are 'train' and 'held_out'."
            )
        return ImageDataset(*BUNDLED[config.source](split))
    configs = split_sources(config)
    sources = [open_source(each) for each in configs]
    if config.sources:
        check_alike(sources, [each.source for each in configs])
    if decode and any(source.references(0) for source in sources):
        raise UserError(f"The images of '{config.source}' are edits of pictures, which no model in pixels takes here.")
    datasets = [Images(source, each) for source, each in zip(sources, configs, strict=True)]
    parts = decode_once(datasets) if decode else datasets
    return Mixture(parts, config) if config.sources else parts[0]


def open_source(config: DataConfig) -> Source:
    """The source that a config names, other than those of BUNDLED; of several see `split_sources`.

    Raises:
        UserError: nothing at the source, or no image in it.
    """
    if config.source in BUNDLED:
        raise UserError(f"The bundled '{config.source}' is trained on alone: give it as data.source.")
    if config.num_frames > 1:
        if config.format not in ("auto", "folder"):
            raise UserError(f"data.num_frames={config.num_frames} takes a folder, not data.format='{config.format}'.")
        if config.masks:
            raise UserError(f"data.masks='{config.masks}' is for images: of videos all counts. Leave it out.")
        return VideoFolder(Path(config.source), config.caption_column, references=config.references)
    kind = find_format(Path(config.source)) if config.format == "auto" else config.format
    for name, folder in (("masks", config.masks), ("references", config.references)):
        if folder and kind != "folder":
            raise UserError(f"data.{name}='{folder}' is for a folder of images, which '{config.source}' is not.")
    if kind == "webdataset":
        return WebDatasetSource(Path(config.source))
    if kind == "datasets":
        return HuggingFaceSource(config)
    if kind == "arrays":
        return ArraySource(config)
    return FolderSource(Path(config.source), config.caption_column, config.masks, config.references)


def find_format(path: Path) -> Literal["folder", "datasets", "webdataset", "arrays"]:
    """What lies at a path.

    Raises:
        UserError: nothing that can be read.
    """
    if find_shards(path):
        return "webdataset"
    if is_array(path):
        return "arrays"
    if is_saved_dataset(path) or is_parquet(path):
        return "datasets"
    if path.is_dir():
        return "folder"
    raise UserError(
        f"No images at '{path}'. data.source can be {', '.join(map(repr, BUNDLED))}, a folder of images, a dataset "
        f"saved by Hugging Face datasets, a .parquet file, a directory of WebDataset shards or one .tar file, a .npz, "
        f".npy or IDX file; or a dataset on the Hub, with data.format=datasets."
    )


def in_memory(dataset: Dataset[dict[str, Any]]) -> ImageDataset:
    """Every image and label of a dataset, as tensors.

    Raises:
        UserError: the images are not all of one size.
    """
    if isinstance(dataset, ImageDataset):
        return dataset
    items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    sizes = {tuple(item["image"].shape) for item in items}
    if len(sizes) > 1:
        raise UserError(f"Images of {len(sizes)} sizes do not make one tensor: choose data.crop=center.")
    images = torch.stack([item["image"] for item in items])
    return ImageDataset(images, torch.tensor([int(item["label"]) for item in items]))
