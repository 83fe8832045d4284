"""Which sites a patch takes, and whether a model has those it was made for."""

from __future__ import annotations

from dataclasses import replace

from stagepatch.backbones import Backbone, Site
from stagepatch.errors import UserError
from stagepatch.patch.config import PatchConfig


def select_sites(backbone: Backbone, config: PatchConfig) -> Backbone:
    """The backbone with the sites that the config selects.

    Raises:
        UserError: unknown site names, or sites that the config's choices cannot be applied to.
    """
    sites = _choose(backbone, config.sites)
    maps = [site.name for site in sites if site.layout != "tokens"]
    if maps:
        raise UserError(
            f"position='{config.position}' needs sites of tokens; {backbone.model_class} has feature maps at "
            f"{', '.join(maps[:3])}."
        )
    counts = {site.num_tokens for site in sites}
    if config.position == "add" and len(counts) > 1:
        raise UserError(f"One gate cannot serve sites of different sizes, {sorted(counts)} tokens: name the sites.")
    return replace(backbone, sites=sites)


def _choose(backbone: Backbone, choice: str | int | list[str] | None) -> tuple[Site, ...]:
    sites = backbone.sites
    if isinstance(choice, list):
        by_name = {site.name: site for site in sites}
        unknown = [name for name in choice if name not in by_name]
        if unknown:
            raise UserError(f"No site is named {', '.join(unknown)}. Sites of this model: {', '.join(by_name)}.")
        return tuple(site for site in sites if site.name in choice)
    if isinstance(choice, int):
        return sites[:choice]
    counts = {"all": len(sites), "half": (len(sites) + 1) // 2, "first": 1}
    return sites[: counts[choice or "all"]]


def check_same_sites(patch: Backbone, model: Backbone) -> None:
    """Refuse a model that differs from the one a patch was made for, by name of what differs.

    Raises:
        UserError: another class, condition width, or other sites.
    """
    differences = []
    for name in ("model_class", "condition_channels"):
        if getattr(patch, name) != getattr(model, name):
            differences.append(f"{name} {getattr(patch, name)} against the model's {getattr(model, name)}")
    patch_names, model_names = [[site.name for site in backbone.sites] for backbone in (patch, model)]
    if patch_names != model_names:
        differences.append(f"{len(patch_names)} sites ({patch_names[0]}…) against {len(model_names)}")
    else:
        for ours, theirs in zip(patch.sites, model.sites, strict=True):
            for name in ("channels", "grid", "layout"):
                if getattr(ours, name) != getattr(theirs, name):
                    given, expected = getattr(ours, name), getattr(theirs, name)
                    differences.append(f"{name} {given} at {ours.name} against {expected}")
    if differences:
        raise UserError(
            f"The patch is for another model: {'; '.join(differences[:4])}. Attach it to the model that it was "
            f"trained on, or create a new one with Patch.create(model)."
        )
