"""Masks beside images: grey pictures that say how much each place of an image counts in the loss.

White counts fully, black not at all, as OneTrainer, kohya's scripts and ai-toolkit have it. Names are OneTrainer's
(`NAME-masklabel.png` beside the image), or those of the images in a folder of its own, as of the others.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from stagepatch.core import UserError, as_user_error
from stagepatch.data.preprocess import upright, upright_size
from stagepatch.data.source import BROKEN

BESIDE = "-masklabel"


def find_masks(
    directory: Path, files: Sequence[Path], folder: Path | None = None
) -> tuple[list[Path], dict[Path, Path]]:
    """The images among files of pictures under a directory, and the mask of each that has one.

    Args:
        folder: the masks lie in it, by the path of their image in the directory; or else beside their images.

    Raises:
        UserError: a mask beside no image, or no mask of any image in the folder.
    """
    if folder is None:
        masks = {path.parent / path.stem.removesuffix(BESIDE): path for path in files if path.stem.endswith(BESIDE)}
        images = [path for path in files if not path.stem.endswith(BESIDE)]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        masks = {directory / path.relative_to(folder).with_name(path.stem): path for path in paths}
        images = [path for path in files if not path.is_relative_to(folder)]
    found = {path: masks[path.parent / path.stem] for path in images if path.parent / path.stem in masks}
    if folder is None and (stray := sorted({*masks.values()} - {*found.values()})):
        raise UserError(f"'{stray[0]}' is the mask of no image beside it: remove it, or add the image.")
    if folder is not None and not found:
        raise UserError(f"No mask in data.masks='{folder}' has the name of an image in '{directory}'.")
    return images, found


def open_mask(path: Path) -> Image.Image:
    """A mask as a grey image, decoded.

    Raises:
        UserError: it cannot be read.
    """
    with as_user_error(f"Cannot read the mask '{path}'", *BROKEN), Image.open(path) as file:
        return upright(file, 1)


def check_mask(path: Path, size: tuple[int, int]) -> None:
    """Refuse a mask that cannot be read or does not fit its image.

    Args:
        size: (height, width) [pixels] of its image, turned as EXIF says.

    Raises:
        UserError: it cannot, or does not.
    """
    with as_user_error(f"Cannot read the mask '{path}'", *BROKEN), Image.open(path) as file:
        found = upright_size(file)
        file.verify()
    if found != size:
        raise UserError(
            f"The mask '{path}' is {found[1]}×{found[0]} pixels, and its image {size[1]}×{size[0]}: make them alike."
        )


def to_weights(masks: Tensor, like: Tensor) -> Tensor:
    """Masks [B, 1, H, W], from 0 to 1, on the grid of latents [B, C, h, w]: means over areas, [B, 1, h, w]."""
    return F.adaptive_avg_pool2d(masks, (like.shape[-2], like.shape[-1]))


def normalized(weights: Tensor) -> Tensor:
    """Weights [B, 1, h, w] of mean 1 over each sample, so that its loss is a mean over what counts.

    Where nothing counts, they stay 0.
    """
    means = weights.mean(dim=(1, 2, 3), keepdim=True)
    return weights / means.clamp_min(torch.finfo(weights.dtype).tiny)
