"""What a patch needs to know of a model family: its sites and its condition. One short file a family."""

from stagepatch.families import auraflow, dit, flux, lumina2, pixart, qwenimage, sana, sd3, unet, wan
from stagepatch.families.base import Attention, Backbone, Extent, Site, block_sites, cut_image
from stagepatch.families.calling import learns_sigma, null_label, num_classes, predict, sample_shape
from stagepatch.families.registry import describe, find_denoiser, in_ones, register

register("DiT", dit.describe_dit, encode_captions=dit.encode_captions)
register("DiTTransformer2DModel", dit.describe_diffusers_dit)
register("UNet2DModel", unet.describe_unet, unet.call_unet)
register("UNet2DConditionModel", unet.describe_unet, unet.call_unet, unet.encode_captions)
register("PixArtTransformer2DModel", pixart.describe_pixart, pixart.call_pixart, pixart.encode_captions)
register("SD3Transformer2DModel", sd3.describe_sd3, encode_captions=sd3.encode_captions)
register("FluxTransformer2DModel", flux.describe_flux, flux.call_flux, flux.encode_captions, in_ones)
register("SanaTransformer2DModel", sana.describe_sana, sana.call_sana, sana.encode_captions)
register(
    "Lumina2Transformer2DModel",
    lumina2.describe_lumina2,
    lumina2.call_lumina2,
    lumina2.encode_captions,
    lumina2.noise_level,
)
register(
    "AuraFlowTransformer2DModel", auraflow.describe_auraflow, auraflow.call_auraflow, auraflow.encode_captions, in_ones
)
register(
    "QwenImageTransformer2DModel",
    qwenimage.describe_qwenimage,
    qwenimage.call_qwenimage,
    qwenimage.encode_captions,
    in_ones,
)
register("WanTransformer3DModel", wan.describe_wan, wan.call_wan, wan.encode_captions)

__all__ = [
    "Attention",
    "Backbone",
    "Extent",
    "Site",
    "block_sites",
    "cut_image",
    "describe",
    "find_denoiser",
    "learns_sigma",
    "null_label",
    "num_classes",
    "predict",
    "register",
    "sample_shape",
]
