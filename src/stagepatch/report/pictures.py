"""Sample grids, and pictures as data URIs."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from stagepatch.core import write_atomically

_GAP, _BACKGROUND = 2, 255
_SMALLEST = 32  # pixels on screen: smaller images are enlarged


def image_grid(images: Tensor, columns: int = 10, scale: int = 0) -> Image.Image:
    """Images [B, C, H, W] in [−1, 1] as one picture, row by row, each pixel `scale` pixels wide.

    Args:
        images: 1 or 3 channels; of more, the first three are shown, stretched to their range.
        scale: 0 enlarges small images to at least 32 pixels.
    """
    tiles = _to_pixels(images, scale)
    _, height, width, _ = tiles.shape
    rows = -(-len(tiles) // columns)
    canvas = torch.full(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _BACKGROUND, dtype=torch.uint8
    )
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.numpy())


def paired_grid(base: Tensor, patched: Tensor, columns: int = 10, scale: int = 0) -> Image.Image:
    """Two grids of images from the same noise, base left and patched right: equal places correspond."""
    left, right = image_grid(base, columns, scale), image_grid(patched, columns, scale)
    space = max(24, left.width // 20)
    canvas = Image.new("RGB", (left.width + space + right.width, left.height), (_BACKGROUND,) * 3)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + space, 0))
    return canvas


def _to_pixels(images: Tensor, scale: int) -> Tensor:
    """[B, H·scale, W·scale, 3] of uint8"""
    images = images.detach().float().cpu()
    if images.shape[1] > 3:
        images = images[:, :3]
        low, high = images.amin(), images.amax()
        images = (images - low) / (high - low).clamp_min(1e-6) * 2.0 - 1.0
    pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    scale = scale or max(1, -(-_SMALLEST // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def to_data_uri(picture: Figure | Image.Image) -> str:
    """A plot or an image as a PNG data URI."""
    buffer = io.BytesIO()
    _save(picture, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_picture(path: str | Path, picture: Figure | Image.Image) -> None:
    """A plot or an image as a PNG file."""
    write_atomically(path, lambda temporary: _save(picture, temporary))


def _save(picture: Figure | Image.Image, file: Any) -> None:
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", dpi=130, bbox_inches="tight")
    else:
        picture.save(file, format="PNG")
