"""The model card of a patch."""

from huggingface_hub import ModelCardData

from stagepatch.checkpoints import is_hub_id, pretrained_arguments, split_revision
from stagepatch.patch.prompts import MixtureOfPrompts


def model_card(patch: MixtureOfPrompts) -> str:
    """README.md of a patch's directory: what it is for, what it was trained on, how to load it."""
    fingerprint, backbone = patch.fingerprint, patch.backbone
    base = fingerprint.model_id
    source = pretrained_arguments(base if is_hub_id(base) else "the base model")
    data = ModelCardData(
        base_model=split_revision(base)[0] if is_hub_id(base) else None,
        library_name="stagepatch",
        tags=["stagepatch", "diffusion", "dmp", backbone.model_class],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A patch for {base or backbone.model_class}",
        "Prompts added to a diffusion model and mixed anew at every timestep (DMP, arXiv 2405.17825), made "
        "with stagepatch. The model's own weights are not in it, and stay as they are.",
        "## Load it\n```python\nfrom diffusers import DiffusionPipeline\nfrom stagepatch import Patch\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({source})\n"
        'patch = Patch.from_pretrained("this directory or its Hub id")\n'
        "patch.attach(pipe)  # patch.scale = 0 is the base model, 1 the patch as trained\n```",
        "## What it is\n" + _rows(describe_patch(patch)),
        "## How it was trained\n" + _rows(patch.facts or {"training": "not recorded"}),
    ]
    return "\n\n".join(parts) + "\n"


def describe_patch(patch: MixtureOfPrompts) -> dict[str, str]:
    """What a patch is, in words."""
    sites, config = patch.backbone.sites, patch.config
    found = {"description": "found in the model's structure, not written"} if patch.backbone.is_found else {}
    return {
        "base model": patch.fingerprint.model_id or "not recorded",
        "architecture": f"{patch.backbone.model_class}, {patch.fingerprint.architecture[:12]}",
        **found,
        "sites": f"{len(sites)}: {sites[0].name} … {sites[-1].name}, {sites[0].channels} channels at the first",
        "reference grid": "×".join(map(str, patch.gate_grid)),
        "parameters": f"{patch.num_parameters():,}",
        "choices": f"preset {config.preset}, position {config.position}, gate {config.gate}, "
        f"condition {config.condition}, selection {config.selection}, {config.num_experts} set(s)",
    }


def _rows(values: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in values.items())])
