"""From an opened image to a tensor of a chosen size."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stagepatch.core import UserError

_ORIENTATION = 0x0112


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The centre square, `size` pixels wide, as ADM (arXiv 2105.05233) prepares images.

    While the smaller side is at least twice the size, both are halved by a box filter; the rest is bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def bucket_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """(height, width) of the buckets, in multiples of `step` [pixels], from the widest to the tallest.

    Areas are at most `size`², aspect ratios from 1:2 to 2:1. For each shorter side the longer one is as long as
    these limits let it be, and there is a square; of buckets with the same aspect ratio the largest stays.

    Raises:
        UserError: no bucket is that small.
    """
    if not 1 <= step <= size:
        raise UserError(f"bucket_step={step} must be from 1 to image_size={size}.")
    area = size * size // (step * step)
    square = math.isqrt(area)
    longest = {1.0: (square * step, square * step)}
    for short in range(1, square + 1):
        long = min(area // short, 2 * short)
        longest[short / long] = (short * step, long * step)
        longest[long / short] = (long * step, short * step)
    return [longest[aspect] for aspect in sorted(longest)]


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (height, width) whose aspect ratio is nearest by factor."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * width / (bucket[1] * height))))


def fit_to_bucket(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """Resized (bicubic) to cover the bucket (height, width), and centre-cropped to it."""
    height, width = bucket
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) [pixels] after EXIF orientation, from the header alone."""
    # Of a PNG without EXIF in its header, getexif would decode the pixels to look behind them.
    looks_behind = image.format == "PNG" and "exif" not in image.info
    orientation = 1 if looks_behind else image.getexif().get(_ORIENTATION, 1)
    return (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Decoded, turned as EXIF says, in colour (3 channels) or grey (1)."""
    return ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")


def to_tensor(image: Image.Image) -> Tensor:
    """[C, H, W] in [−1, 1]."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
