"""A folder of images; subfolders, where there are any, are the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class ImageFolder(Dataset[dict[str, Any]]):
    """Images under a folder, resized and centre-cropped to a square, [C, H, W] in [−1, 1].

    Every file's header is read once, at the start, so that a broken image is named before training begins.

    Args:
        directory: images lie in it or in its subfolders; subfolders in alphabetical order are labels 0, 1, ….
        image_size: side of the square [pixels].
        channels: 3 for colour, 1 for grey.

    Raises:
        UserError: no such folder, no image in it, or a broken one.
    """

    def __init__(self, directory: Path, image_size: int, channels: int) -> None:
        if not directory.is_dir():
            raise UserError(f"No image folder at '{directory}': give a folder of images, or 'digits'.")
        if channels not in (1, 3):
            raise UserError(f"channels={channels} must be 1 (grey) or 3 (colour).")
        paths = (path for path in directory.rglob("*") if path.suffix.lower() in _SUFFIXES)
        self.paths = sorted(path for path in paths if path.is_file())
        if not self.paths:
            raise UserError(f"No image in '{directory}': looked for {', '.join(sorted(_SUFFIXES))}.")
        self.image_size = image_size
        self.mode = "RGB" if channels == 3 else "L"
        classes = sorted({path.parent for path in self.paths})
        self.labels = [classes.index(path.parent) for path in self.paths]
        for path in self.paths:
            _verify(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with Image.open(self.paths[index]) as file:
                image = ImageOps.exif_transpose(file).convert(self.mode)
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(_broken(self.paths[index], error)) from error
        image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return {"image": _to_tensor(image), "label": self.labels[index]}


def _verify(path: Path) -> None:
    try:
        with Image.open(path) as file:
            file.verify()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(_broken(path, error)) from error


def _broken(path: Path, error: Exception) -> str:
    return f"Cannot read the image '{path}' ({error}): repair or remove it."


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
