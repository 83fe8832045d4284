"""Which sites a patch takes, and whether a model has those it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagepatch.core.errors import UserError
from stagepatch.families import Backbone, Site
from stagepatch.patch.config import PatchConfig

_KINDS = {"stages": "stage", "attention": "attention"}


def select_sites(backbone: Backbone, config: PatchConfig) -> Backbone:
    """The backbone with the sites that the config selects.

    Raises:
        UserError: unknown site names, or sites that the config's choices cannot be applied to.
    """
    sites = _choose(backbone, config.sites)
    if config.position == "prepend":
        sites = _check_prepending(backbone, sites, config.prepending)
    if config.grid is not None and len(config.grid) != len(backbone.grid):
        raise UserError(
            f"grid={config.grid} must have {len(backbone.grid)} numbers for {backbone.model_class}, whose tokens lie "
            f"on a grid of {' × '.join(map(str, backbone.grid))}."
        )
    return replace(backbone, sites=sites)


def _choose(backbone: Backbone, choice: str | int | list[str] | None) -> tuple[Site, ...]:
    if isinstance(choice, list):
        by_name = {site.name: site for site in backbone.sites}
        unknown = [name for name in choice if name not in by_name]
        if unknown:
            raise UserError(f"No site is named {', '.join(unknown)}. Sites of this model: {', '.join(by_name)}.")
        return tuple(site for site in backbone.sites if site.name in choice)
    kind = _KINDS.get(str(choice), backbone.sites[0].kind)
    sites = tuple(site for site in backbone.sites if site.kind == kind)
    if not sites:
        raise UserError(f"sites={choice!r}: {backbone.model_class} has no {choice}.")
    if isinstance(choice, int):
        return sites[:choice]
    counts = {"half": (len(sites) + 1) // 2, "first": 1}
    return sites[: counts.get(choice or "all", len(sites))]


def _check_prepending(backbone: Backbone, sites: tuple[Site, ...], prepending: str) -> tuple[Site, ...]:
    if prepending == "plain":
        odd = [site.name for site in sites if site.layout != "tokens" or site.image_tokens != "first"]
        needs = "sites of image tokens alone"
    else:
        odd = [site.name for site in sites if site.attention is None]
        needs = "sites whose attention is described (in a U-Net, sites='attention')"
    if odd:
        raise UserError(
            f"position='prepend' with prepending='{prepending}' needs {needs}; {backbone.model_class} has others: "
            f"{', '.join(odd[:3])}."
        )
    return sites


def check_same_sites(patch: Backbone, model: Backbone, also: Sequence[str] = ()) -> None:
    """Refuse a model that differs from the one a patch was made for, by name of what differs.

    Grids may differ: prompts are resampled.

    Args:
        also: further differences.

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
            for name in ("channels", "layout", "image_tokens"):
                if getattr(ours, name) != getattr(theirs, name):
                    given, expected = getattr(ours, name), getattr(theirs, name)
                    differences.append(f"{name} {given} at {ours.name} against {expected}")
    differences += also
    if differences:
        raise UserError(
            f"The patch is for another model: {'; '.join(differences[:4])}. Attach it to the model that it was "
            f"trained on, or create a new one with Patch.create(model)."
        )
