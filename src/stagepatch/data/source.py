"""What a source of images gives, item by item."""

import hashlib
import struct
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that it cannot read."""

KEYS = 2**31
"""How many numbers `key_of` gives."""


class Source(Protocol):
    """Images with labels and captions, in a fixed order; usable from several loading processes at once."""

    def __len__(self) -> int:
        """Number of items."""

    def load(self, index: int) -> Image.Image:
        """The image, opened: header read, pixels not yet decoded.

        Raises:
            one of BROKEN: it is not an image that can be read.
        """

    def label(self, index: int) -> int:
        """The class; 0 where there are none."""

    def captions(self, index: int) -> list[str]:
        """The captions, at least one: '' where there is none."""

    def name(self, index: int) -> str:
        """The file or row, for messages."""

    def key(self, index: int) -> str:
        """What tells an item from the others, wherever the data lie and whatever else is among them."""

    def stamp(self) -> list[str]:
        """A string for each item that changes when its file does, found without reading images."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, …, where they are known."""
        return []

    def mask(self, index: int) -> Path | None:
        """The image's mask, where it has one."""
        return None

    @property
    def has_masks(self) -> bool:
        """Whether any image has one."""
        return False

    def references(self, index: int) -> list[Path]:
        """The pictures that the image is the edit of; as many for each."""
        return []


def key_of(key: str) -> int:
    """A number from 0 to KEYS − 1, all alike probable, by a hash (SHA-256) of an item's key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


def as_captions(value: Any) -> list[str]:
    """Captions as metadata have them: a string, a list of strings, or none.

    Raises:
        ValueError: it is something else.
    """
    captions = value if isinstance(value, list) else ["" if value is None else value]
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError("a caption is a string, several are a list of strings")
    return captions or [""]
