"""Where images come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataConfig:
    """Training images.

    Args:
        source: 'digits' (scikit-learn's, the two thirds that are for training) or a folder of images.
        image_size: height and width [pixels] to which a folder's images are resized and centre-cropped.
        channels: 3 for colour, 1 for grey.
        horizontal_flip: mirror each image with probability ½ (DMP: on; never for digits).
        num_workers: loading processes beside the main one.
    """

    source: str = "digits"
    image_size: int = 256
    channels: int = 3
    horizontal_flip: bool = False
    num_workers: int = 0
