"""A patch as a directory: `config.json` and `model.safetensors`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import stagepatch
from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, read_tensors, write_json, write_tensors, write_text
from stagepatch.families import Attention, Backbone, Site
from stagepatch.models.convert import load_original_state_dict
from stagepatch.patch.card import model_card
from stagepatch.patch.config import PatchConfig
from stagepatch.patch.fingerprint import Fingerprint
from stagepatch.patch.hub import download, upload
from stagepatch.patch.patch import Patch

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def patch_tensors(patch: Patch) -> dict[str, Tensor]:
    """The learned tensors by their names in the file: `prompts.{site}`, `gate.weight`, `gate.bias`, …"""
    sites = patch.backbone.sites
    tensors = {f"prompts.{site.name}": prompt for site, prompt in zip(sites, patch.prompts, strict=True)}
    if patch.is_gated_prepending:
        tensors |= {f"head_gates.{site.name}": gate for site, gate in zip(sites, patch.head_gates, strict=True)}
    if patch.gate is not None:
        tensors |= {f"gate.{name}": parameter for name, parameter in patch.gate.named_parameters()}
    return tensors


def save_patch(patch: Patch, directory: str | Path) -> None:
    """See `Patch.save_pretrained`."""
    directory = Path(directory)
    config = {
        "stagepatch_version": stagepatch.__version__,
        "patch": asdict(patch.config),
        "fingerprint": asdict(patch.fingerprint),
        "facts": patch.facts,
        "backbone": {name: value for name, value in asdict(patch.backbone).items() if name != "begin"},
    }
    write_tensors(directory / WEIGHTS_NAME, patch_tensors(patch))
    write_json(directory / CONFIG_NAME, config)
    write_text(directory / CARD_NAME, model_card(patch))


def push_patch(patch: Patch, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """See `Patch.push_to_hub`."""
    with tempfile.TemporaryDirectory(prefix="stagepatch-") as directory:
        save_patch(patch, directory)
        return upload(Path(directory), repo_id, private, token, message)


def load_patch(source: str | Path, revision: str | None = None, token: str | None = None) -> Patch:
    """See `Patch.from_pretrained`."""
    directory = Path(source)
    if not directory.is_dir():
        if not _HUB_ID.fullmatch(str(source)):
            raise UserError(f"No patch at '{source}': no such directory.")
        directory = download(str(source), [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME], revision, token)
    config = read_json(directory / CONFIG_NAME)
    if not isinstance(config.get("patch"), dict) or not isinstance(config.get("backbone"), dict):
        raise UserError(f"'{directory / CONFIG_NAME}' is not a patch's config: no 'patch' and 'backbone' in it.")
    patch = Patch(PatchConfig.from_dict(config["patch"]), _backbone_from_dict(config["backbone"]))
    tensors, _ = read_tensors(directory / WEIGHTS_NAME)
    fill_patch(patch, tensors, str(directory / WEIGHTS_NAME))
    patch.fingerprint = _fingerprint_from_dict(config.get("fingerprint", {}))
    patch.facts = {str(name): str(value) for name, value in config.get("facts", {}).items()}
    return patch.eval()


def _fingerprint_from_dict(values: dict[str, Any]) -> Fingerprint:
    try:
        return Fingerprint(**values)
    except TypeError as error:
        raise UserError(f"A patch's config has a fingerprint in a form not known here: {error}.") from error


def fill_patch(patch: Patch, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a patch.

    Raises:
        UserError: names or shapes other than the patch's.
    """
    own = patch_tensors(patch)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))
        raise UserError(f"'{source}' does not hold this patch: {', '.join(odd[:4])} missing or not expected.")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            given, expected = tuple(tensors[name].shape), tuple(parameter.shape)
            raise UserError(f"'{source}' does not hold this patch: {name} is {given}, expected {expected}.")
        parameter.data.copy_(tensors[name])


def _backbone_from_dict(values: dict[str, Any]) -> Backbone:
    try:
        sites = tuple(_site_from_dict(site) for site in values["sites"])
        if not sites:
            raise KeyError("sites")
        lists = {name: tuple(values[name]) for name in ("condition_taps", "grid")}
        return Backbone(**{**values, **lists, "sites": sites})
    except (KeyError, TypeError) as error:
        raise UserError(f"A patch's config describes its backbone in a form not known here: {error}.") from error


def _site_from_dict(values: dict[str, Any]) -> Site:
    attention = values.get("attention")
    attention = None if attention is None else Attention(**attention)
    return Site(**{**values, "grid": tuple(values["grid"]), "attention": attention})


def load_released(checkpoint: str | Path | Mapping[str, Any]) -> Patch:
    """See `Patch.from_released`."""
    state = load_original_state_dict(checkpoint)
    missing = [name for name in ("prompt_embeddings", "gate.weight", "gate.bias") if name not in state]
    if missing:
        raise UserError(f"Not a checkpoint of DMP's released code: no {', '.join(missing)} in it.")
    prompts = state["prompt_embeddings"]
    if prompts.ndim != 3 or state["gate.weight"].ndim != 2:
        raise UserError(
            f"Not a checkpoint of DMP's released code: prompt_embeddings is {list(prompts.shape)}, expected "
            f"[L, N, D], and gate.weight {list(state['gate.weight'].shape)}, expected [N, D+1]."
        )
    num_sites, num_tokens, channels = prompts.shape
    side = round(num_tokens**0.5)
    names = [f"blocks.{index}" for index in range(num_sites)]
    sites = tuple(Site(name, name, index, channels, (side, side)) for index, name in enumerate(names))
    taps = ("y_embedder",) if any(name.startswith("y_embedder.") for name in state) else ()
    config = PatchConfig(
        preset="released",
        sites=num_sites,
        block_index=state["gate.weight"].shape[1] == channels + 1,
        gate_noise="w_noise" in state,
    )
    patch = Patch(config, Backbone("DiT", sites, "t_embedder", taps, channels, (side, side)))
    tensors = {f"prompts.{name}": prompts[index] for index, name in enumerate(names)}
    tensors |= {"gate.weight": state["gate.weight"], "gate.bias": state["gate.bias"]}
    if "w_noise" in state:
        noise = state["w_noise"]
        transposed = noise.shape != state["gate.weight"].shape
        tensors["gate.noise_weight"] = noise.T if transposed else noise
    fill_patch(patch, tensors, "the released checkpoint")
    return patch.eval()
