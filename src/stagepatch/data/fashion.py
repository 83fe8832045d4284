"""Fashion-MNIST (arXiv 1708.07747, MIT licence) at 16×16 pixels: 60,000 images to train on, 10,000 held out.

A copy is bundled, made by `experiments/make_fashion.py` from the four files that the data set is published as.
"""

import hashlib
import lzma
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stagepatch.core import UserError

NUM_CLASSES = 10
SIZE = 16
ASSET = Path(__file__).parent.parent / "assets" / "fashion-16.xz"
SHA256 = "b9f7c71ec9206ab1a1db5013778e136554158bf50fdcd96c037ae97aefc2460c"
_TRAIN, _ALL = 60_000, 70_000


def load_fashion(split: Literal["train", "tune", "held_out"]) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 16, 16] in [−1, 1] and labels [B].

    The data set's 60,000 training images; every other one of its 10,000 test images to choose settings by (`tune`);
    and the other 5,000 to report on (`held_out`).

    Raises:
        UserError: the bundled copy is damaged.
    """
    data = ASSET.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"'{ASSET}' is not the copy that this version came with: install stagepatch again.")
    values = np.frombuffer(lzma.decompress(data), np.uint8)
    pixels, labels = np.split(values, [_ALL * SIZE**2])
    chosen = {
        "train": slice(0, _TRAIN),
        "tune": slice(_TRAIN, _ALL, 2),
        "held_out": slice(_TRAIN + 1, _ALL, 2),
    }[split]
    images = torch.from_numpy(pixels.reshape(_ALL, 1, SIZE, SIZE)[chosen].copy()).float() / 127.5 - 1.0
    return images, torch.from_numpy(labels[chosen].astype(np.int64))
