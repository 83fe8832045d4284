"""What a patch needs to know of a model family: its sites and its condition. One short file a family."""

from stagepatch.backbones import auraflow, dit, flux, lumina2, pixart, qwenimage, sana, sd3, unet, wan
from stagepatch.backbones.base import Attention, Backbone, Extent, Site
from stagepatch.backbones.calling import is_class_conditional, learns_sigma, null_label, predict, sample_shape
from stagepatch.backbones.loading import load_denoiser, save_denoiser
from stagepatch.backbones.registry import describe, find_denoiser, register

for _name, _describe in {
    "DiT": dit.describe_dit,
    "DiTTransformer2DModel": dit.describe_diffusers_dit,
    "UNet2DModel": unet.describe_unet,
    "UNet2DConditionModel": unet.describe_unet,
    "PixArtTransformer2DModel": pixart.describe_pixart,
    "SD3Transformer2DModel": sd3.describe_sd3,
    "FluxTransformer2DModel": flux.describe_flux,
    "SanaTransformer2DModel": sana.describe_sana,
    "Lumina2Transformer2DModel": lumina2.describe_lumina2,
    "AuraFlowTransformer2DModel": auraflow.describe_auraflow,
    "QwenImageTransformer2DModel": qwenimage.describe_qwenimage,
    "WanTransformer3DModel": wan.describe_wan,
}.items():
    register(_name, _describe)

__all__ = [
    "Attention",
    "Backbone",
    "Extent",
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
