"""scikit-learn's digits: 1,797 scans of 8×8 pixels, a third of them held out for good."""

from typing import Literal

import torch
from torch import Tensor

NUM_CLASSES = 10
_SPLIT_SEED = 0


def load_digits(split: Literal["train", "held_out", "all"]) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 8, 8] in [−1, 1] and labels [B].

    The split is stratified by class and always the same: 1,198 images to train on, 599 that nothing in this
    project ever trains on.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_sklearn_digits(return_X_y=True)
    indices = range(len(labels))
    train, held_out = train_test_split(indices, test_size=1 / 3, stratify=labels, random_state=_SPLIT_SEED)
    chosen = {"train": sorted(train), "held_out": sorted(held_out), "all": list(indices)}[split]
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8.0 - 1.0
    return images[chosen], torch.from_numpy(labels).long()[chosen]
