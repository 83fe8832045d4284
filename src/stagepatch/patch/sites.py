"""Which sites a patch takes, and whether a model has those it was made for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stagepatch.core import UserError
from stagepatch.families import Backbone, Site, describe, has_family, takes_text, text_channels
from stagepatch.patch.config import PatchConfig


def with_condition(config: PatchConfig, model: Any) -> PatchConfig:
    """The config, its gate's condition that of the model's kind where the preset leaves it to that (DMP, Table 9).

    Of a model whose description is found, not written, t+c is not known, and it is t.
    """
    if config.condition:
        return config
    return replace(config, condition="t+c" if has_family(type(model)) and takes_text(model) else "t")


def describe_for(model: Any, config: PatchConfig) -> Backbone:
    """The description of a model, with the sites and the condition that the config selects.

    Raises:
        UserError: unknown site names, sites that the config's choices cannot be applied to, or a model without text
            whose text the gate should see.
    """
    backbone = _select_sites(describe(model, config.sample_size), config)
    if backbone.is_found and config.condition == "t+c":
        raise UserError(
            f"condition='t+c' needs to know which modules of {backbone.model_class} embed its class or text, which "
            f"its structure does not show. Take 't' or 't+text', or describe it as docs/adding-a-family.md shows."
        )
    if config.condition != "t+text":
        return backbone
    if not (channels := text_channels(model)):
        raise UserError(
            f"condition='t+text' needs a model that takes text as encoder_hidden_states; {backbone.model_class} takes "
            f"none. Take 't' or 't+c'."
        )
    return replace(backbone, condition_channels=backbone.condition_channels + channels)


def _select_sites(backbone: Backbone, config: PatchConfig) -> Backbone:
    sites = _choose(backbone, config.sites)
    if config.position == "prepend":
        _check_prepending(backbone, sites, config.prepending)
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
    kind = {"stages": "stage", "attention": "attention"}.get(str(choice), backbone.sites[0].kind)
    sites = tuple(site for site in backbone.sites if site.kind == kind)
    if not sites:
        raise UserError(f"sites={choice!r}: {backbone.model_class} has no {choice}.")
    counts = {"first": 1, "half": (len(sites) + 1) // 2}
    count = choice if isinstance(choice, int) else counts.get(str(choice))
    return sites[:count]


def _check_prepending(backbone: Backbone, sites: tuple[Site, ...], prepending: str) -> None:
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


def check_same_sites(patch: Backbone, model: Backbone, also: Sequence[str] = ()) -> None:
    """Refuse a model that differs from the one a patch was made for, by name of what differs.

    Grids may differ: prompts are resampled.

    Args:
        also: further differences.

    Raises:
        UserError: another class, condition width, or other sites.
    """
    differences = _differences(patch, model, ("model_class", "condition_channels"))
    patch_names, model_names = [[site.name for site in backbone.sites] for backbone in (patch, model)]
    if patch_names == model_names:
        for ours, theirs in zip(patch.sites, model.sites, strict=True):
            differences += _differences(ours, theirs, ("channels", "layout", "image_tokens"), f" at {ours.name}")
    else:
        differences.append(f"{len(patch_names)} sites ({patch_names[0]}…) against {len(model_names)}")
    differences += also
    if differences:
        raise UserError(
            f"The patch is for another model: {'; '.join(differences[:4])}. Attach it to the model that it was "
            f"trained on, or create a new one with Patch.create(model)."
        )


def _differences(ours: object, theirs: object, names: Sequence[str], where: str = "") -> list[str]:
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    return [f"{name} {one}{where} against the model's {other}" for name, one, other in pairs if one != other]
