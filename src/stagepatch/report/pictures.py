"""Sample grids, and pictures as PNG."""

import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
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
    return _laid_out(_to_pixels(images, scale), columns)


def paired_grids(base: Tensor, patched: Tensor, columns: int = 10, scale: int = 0) -> tuple[Image.Image, Image.Image]:
    """Grids of images from the same noise: equal places correspond, further channels are stretched alike."""
    tiles = _to_pixels(torch.cat([base.cpu(), patched.cpu()]), scale)
    return _laid_out(tiles[: len(base)], columns), _laid_out(tiles[len(base) :], columns)


def paired_grid(base: Tensor, patched: Tensor, columns: int = 10, scale: int = 0) -> Image.Image:
    """`paired_grids` as one picture, base left and patched right."""
    left, right = paired_grids(base, patched, columns, scale)
    space = _space(left.width)
    canvas = Image.new("RGB", (left.width + space + right.width, left.height), (_BACKGROUND,) * 3)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + space, 0))
    return canvas


def split_pair(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The grids that `paired_grid` put beside each other.

    Raises:
        ValueError: no such picture, by its width.
    """
    width = next((w for w in range(picture.width // 2) if 2 * w + _space(w) == picture.width), 0)
    if not width:
        raise ValueError(f"A picture of {picture.width} pixels is no pair of grids.")
    left = picture.crop((0, 0, width, picture.height))
    return left, picture.crop((picture.width - width, 0, picture.width, picture.height))


def _space(width: int) -> int:
    """Between two grids of so many pixels."""
    return max(24, width // 20)


def _laid_out(tiles: Tensor, columns: int) -> Image.Image:
    """Tiles [B, H, W, 3] of uint8, row by row."""
    _, height, width, _ = tiles.shape
    rows = -(-len(tiles) // columns)
    canvas = torch.full(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _BACKGROUND, dtype=torch.uint8
    )
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas.numpy())


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


def to_png(picture: Figure | Image.Image) -> bytes:
    """A plot or an image as a PNG."""
    buffer = io.BytesIO()
    _save(picture, buffer)
    return buffer.getvalue()


def write_picture(path: str | Path, picture: Figure | Image.Image) -> None:
    """A plot or an image as a PNG file."""
    write_atomically(path, lambda temporary: _save(picture, temporary))


def _save(picture: Figure | Image.Image, file: Any) -> None:
    if isinstance(picture, Figure):
        _show_as_given(picture)
        picture.savefig(file, format="png", dpi=130, bbox_inches="tight")
    else:
        picture.save(file, format="PNG")


def _show_as_given(figure: Figure) -> None:
    """Names with dollar signs are no mathematics; ticks that matplotlib writes (of a logarithm, say) are."""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)
