"""Denoisers of our own. A model here does not know that it can be patched."""

from stagepatch.models.dit import DIT_SIZES, DiT

__all__ = ["DIT_SIZES", "DiT"]
