"""Denoisers of our own. A model here does not know that it can be patched."""

from stagepatch.models.dit import DiT
from stagepatch.models.sizes import DIT_SIZES

__all__ = ["DIT_SIZES", "DiT"]
