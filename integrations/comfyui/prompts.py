"""A patch of prompts (DMP) on a MODEL of FLUX.1, by stagepatch itself, which must be installed in ComfyUI's Python.

ComfyUI's Flux (comfy/ldm/flux/model.py at 040a324) has the embeddings and blocks of diffusers' under other names, and
its single blocks take text and image as one sequence, the image last. So the patch's description is told those names,
and stagepatch attaches it as it does in diffusers, for the length of one call of the model. README.md says what of it
was run.
"""

from dataclasses import replace

KEY = "stagepatch_prompts"
_FLUX = {
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.guidance_embedder": "guidance_in",
    "time_text_embed.text_embedder": "vector_in",
}


class Prompts:
    """A wrapper around the model's call, in which the patch is attached."""

    def __init__(self, patch):
        if patch.backbone.model_class != "FluxTransformer2DModel" or patch.config.position != "add":
            raise ValueError(
                f"A patch of {patch.backbone.model_class}, position '{patch.config.position}', is not put on a MODEL: "
                f"only FLUX.1's, whose prompts are added."
            )
        self.patch = patch
        patch.backbone = _renamed(patch.backbone)

    def __call__(self, executor, *args, **kwargs):
        from stagepatch.patch import Attachment

        with Attachment(self.patch, executor.class_obj.diffusion_model, self.patch.backbone):
            return executor(*args, **kwargs)


def _renamed(backbone):
    sites = []
    for site in backbone.sites:
        kind, number = site.module.split(".")
        if kind == "transformer_blocks":
            sites.append(replace(site, module=f"double_blocks.{number}", argument="img"))
        else:
            sites.append(replace(site, module=f"single_blocks.{number}", argument="x", image_tokens="last"))
    taps = tuple(_FLUX[name] for name in backbone.condition_taps)
    return replace(backbone, sites=tuple(sites), time_tap=_FLUX[backbone.time_tap], condition_taps=taps, begin=_extent)


def _extent(model, arguments):
    """Of latents [B, C, height, width], which are padded to whole patches."""
    from stagepatch.families.base import Extent

    size = model.patch_size
    return Extent(grid=tuple(-(-length // size) for length in arguments["x"].shape[-2:]))


def put_patch_on(model, directory, scale):
    """A clone of a MODEL with a patch.

    Args:
        model: a ModelPatcher.
        directory: of the patch, or its Hub id.
    """
    from comfy.patcher_extension import WrappersMP

    from stagepatch import Patch

    model, patch = model.clone(), Patch.from_pretrained(directory)
    patch.scale = scale
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, Prompts(patch))
    return model
