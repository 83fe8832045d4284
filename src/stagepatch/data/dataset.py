"""A data source by name, as a map-style dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.data.config import DataConfig
from stagepatch.data.digits import load_digits
from stagepatch.data.folder import ImageFolder


class ImageDataset(Dataset[dict[str, Any]]):
    """Images [B, C, H, W] in [−1, 1] and labels [B], in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


def load_dataset(config: DataConfig, split: Literal["train", "held_out"] = "train") -> Dataset[dict[str, Any]]:
    """The dataset that a config names. A folder has no held-out split of its own.

    Raises:
        UserError: no such folder, or no image in it.
    """
    if config.source == "digits":
        return ImageDataset(*load_digits(split))
    return ImageFolder(Path(config.source), config.image_size, config.channels)


def in_memory(dataset: Dataset[dict[str, Any]]) -> ImageDataset:
    """Every image and label of a dataset, as tensors."""
    if isinstance(dataset, ImageDataset):
        return dataset
    items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    images = torch.stack([item["image"] for item in items])
    return ImageDataset(images, torch.tensor([int(item["label"]) for item in items]))
