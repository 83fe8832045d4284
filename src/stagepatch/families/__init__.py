"""What a patch needs to know of a model family: its sites and its condition. A row in `table`, or a file, a family."""

from stagepatch.families import dit, flux, qwenimage, table, unet
from stagepatch.families.base import Attention, Backbone, Extent, Site
from stagepatch.families.calling import learns_sigma, null_label, num_classes, predict, sample_shape
from stagepatch.families.registry import add_families, describe, find_denoiser, prompt_encoder, register
from stagepatch.families.transformer import Blocks, Transformer

add_families([*dit.FAMILIES, *unet.FAMILIES, *table.FAMILIES, flux.FAMILY, qwenimage.FAMILY])

__all__ = [
    "Attention",
    "Backbone",
    "Blocks",
    "Extent",
    "Site",
    "Transformer",
    "describe",
    "find_denoiser",
    "learns_sigma",
    "null_label",
    "num_classes",
    "predict",
    "prompt_encoder",
    "register",
    "sample_shape",
]
