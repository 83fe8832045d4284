"""What a patch needs to know of a model family: its sites and its condition. One short file a family."""

from stagepatch.backbones import dit
from stagepatch.backbones.base import Backbone, Site
from stagepatch.backbones.registry import describe, find_denoiser, register

register("DiT", dit.describe)

__all__ = ["Backbone", "Site", "describe", "find_denoiser", "register"]
