"""What a patch needs to know of a model family: its sites and its condition. One short file a family."""

from stagepatch.backbones import dit
from stagepatch.backbones.base import Backbone, Site
from stagepatch.backbones.calling import is_class_conditional, learns_sigma, null_label, predict, sample_shape
from stagepatch.backbones.loading import load_denoiser, save_denoiser
from stagepatch.backbones.registry import describe, find_denoiser, register

register("DiT", dit.describe)

__all__ = [
    "Backbone",
    "Site",
    "describe",
    "find_denoiser",
    "is_class_conditional",
    "learns_sigma",
    "load_denoiser",
    "null_label",
    "predict",
    "register",
    "sample_shape",
    "save_denoiser",
]
