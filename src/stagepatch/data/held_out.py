"""Images that are kept out of training, for the loss on them to be measured."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from stagepatch.core import UserError
from stagepatch.data.config import DataConfig
from stagepatch.data.dataset import BUNDLED, load_dataset
from stagepatch.data.source import KEYS


class Part(Dataset[dict[str, Any]]):
    """Some items of a dataset, with what training asks one for: groups, captions, the condition of none.

    Args:
        dataset: of all items.
        indices: of those that are in the part.

    Attributes:
        held_out: the other items, where the part is what is trained on.
    """

    held_out: "Part"

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.null_condition: dict[str, Tensor] | None = getattr(dataset, "null_condition", None)
        counts: Tensor | None = getattr(dataset, "caption_counts", None)
        self.caption_counts = None if counts is None else counts[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """An item by its number in the part, or by that and the number of one of its captions."""
        place = (self.indices[index[0]], index[1]) if isinstance(index, tuple) else self.indices[index]
        item: dict[str, Any] = self.dataset[place]
        return item

    def labels(self) -> list[int]:
        """The class of each item."""
        labels = self.dataset.labels()
        return [labels[index] for index in self.indices]

    def groups(self) -> list[list[int]]:
        """Indices of items that a batch may hold together."""
        places = {index: place for place, index in enumerate(self.indices)}
        groups = self.dataset.groups() if hasattr(self.dataset, "groups") else [range(len(self.dataset))]
        kept = [[places[index] for index in group if index in places] for group in groups]
        return [group for group in kept if group]


def hold_out(dataset: Any, keys: Sequence[int], share: float) -> Part:
    """The items of a dataset that are trained on; the others are its `held_out`.

    An item is held out if its key is in the lowest `share` of all that there can be: whatever order items come in, and
    whichever are added or removed.

    Args:
        keys: of each item, see `key_of`.
        share: from 0 to 1, of the items; about as many are held out.

    Raises:
        UserError: no such share, or one that holds out none, or all.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"data.held_out={share:g} must be a share, from 0 to below 1.")
    is_held_out = [key < share * KEYS for key in keys]
    kept, others = ([index for index, out in enumerate(is_held_out) if out is wanted] for wanted in (False, True))
    if not kept or not others:
        raise UserError(f"data.held_out={share:g} holds out {len(others)} of {len(keys)} images: take another share.")
    part = Part(dataset, kept)
    part.held_out = Part(dataset, others)
    return part


def load_held_out(data: DataConfig, trained: Any) -> Dataset[dict[str, Any]]:
    """The images that are not trained on: of bundled data those that settings are chosen by.

    Args:
        trained: what `load_training_data` gave.

    Raises:
        UserError: all are trained on.
    """
    if data.source in BUNDLED:
        return load_dataset(data, "held_out" if data.source == "digits" else "tune")
    if not isinstance(trained, Part):
        raise UserError(f"All images of '{data.source}' are trained on: hold some out, as by data.held_out=0.02.")
    return trained.held_out
