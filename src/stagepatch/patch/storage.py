"""A patch as a directory: `config.json` and `model.safetensors`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import stagepatch
from stagepatch.checkpoints import from_hub, is_hub_id
from stagepatch.core import UserError, as_user_error, read_json, read_tensors, write_json, write_tensors, write_text
from stagepatch.families import Attention, Backbone, Site
from stagepatch.models import load_original_state_dict
from stagepatch.patch.card import model_card
from stagepatch.patch.config import PatchConfig
from stagepatch.patch.fingerprint import Fingerprint
from stagepatch.patch.prompts import MixtureOfPrompts

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
# What a config with odd values raises, wherever it is used.
_ODD = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError, MemoryError)
_FUNCTIONS = ("begin", "reduce")  # of a description, which a file does not hold
_Patch = TypeVar("_Patch", bound=MixtureOfPrompts)


def save_patch(patch: MixtureOfPrompts, directory: Path) -> None:
    """Write the files, each whole or not at all."""
    config = {
        "stagepatch_version": stagepatch.__version__,
        "patch": asdict(patch.config),
        "fingerprint": asdict(patch.fingerprint),
        "facts": patch.facts,
        "backbone": _backbone_to_dict(patch.backbone),
    }
    write_tensors(directory / WEIGHTS_NAME, patch.named_tensors())
    write_json(directory / CONFIG_NAME, config)
    write_text(directory / CARD_NAME, model_card(patch))


def find_patch(source: str | Path, **options: Any) -> Path:
    """A patch's directory: the source itself, or where the files of a Hub id are kept.

    Args:
        options: of `snapshot_download`.

    Raises:
        UserError: no such directory or repository, or it cannot be reached and is not in the cache.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise UserError(f"No patch at '{source}': no such directory.")
    return from_hub(source, [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME], "patch", **options)


def load_patch(patch_class: type[_Patch], directory: Path) -> _Patch:
    """A patch out of its directory, in eval mode.

    Raises:
        UserError: missing, truncated or foreign files.
    """
    config = read_json(directory / CONFIG_NAME)
    if not isinstance(config.get("patch"), dict) or not isinstance(config.get("backbone"), dict):
        raise UserError(f"'{directory / CONFIG_NAME}' is not a patch's config: no 'patch' and 'backbone' in it.")
    tensors, _ = read_tensors(directory / WEIGHTS_NAME)
    if "gate.keys" in tensors:  # this gate was once called 'attention'
        config["patch"]["gate"] = "learned_keys"
    with as_user_error(f"'{directory / CONFIG_NAME}' describes no patch", *_ODD):
        choices, backbone = PatchConfig.from_dict(config["patch"]), _backbone_from_dict(config["backbone"])
        with torch.device("meta"):  # no memory is taken for sizes that a config says and the tensors do not have
            shape = patch_class(choices, backbone)
    if (noise := tensors.get("gate.noise_weight")) is not None:  # it once saw the block's index too
        tensors["gate.noise_weight"] = noise[:, : backbone.condition_channels]
    shape.fill(tensors, str(directory / WEIGHTS_NAME))
    patch = patch_class(choices, backbone)
    patch.fill(tensors, str(directory / WEIGHTS_NAME))
    with as_user_error("A patch's config has a fingerprint in a form not known here", TypeError):
        patch.fingerprint = Fingerprint(**config.get("fingerprint", {}))
    facts = config.get("facts", {})
    patch.facts = {str(name): str(value) for name, value in facts.items()} if isinstance(facts, dict) else {}
    return patch.eval()


def _backbone_to_dict(backbone: Backbone) -> dict[str, Any]:
    """`is_found` is there where it is so."""
    values = {name: value for name, value in asdict(backbone).items() if name not in _FUNCTIONS}
    return values if backbone.is_found else {name: value for name, value in values.items() if name != "is_found"}


def _backbone_from_dict(values: dict[str, Any]) -> Backbone:
    with as_user_error("A patch's config describes its backbone in a form not known here", KeyError, TypeError):
        sites = tuple(_site_from_dict(site) for site in values["sites"])
        if not sites:
            raise KeyError("sites")
        lists = {name: tuple(values[name]) for name in ("condition_taps", "grid")}
        return Backbone(**{**values, **lists, "sites": sites})


def _site_from_dict(values: dict[str, Any]) -> Site:
    attention = values.get("attention")
    attention = None if attention is None else Attention(**attention)
    return Site(**{**values, "grid": tuple(values["grid"]), "attention": attention})


def load_released(patch_class: type[_Patch], checkpoint: str | Path | Mapping[str, Any], top_k: float) -> _Patch:
    """See `Patch.from_released`."""
    state = load_original_state_dict(checkpoint)
    gate = [name for name in ("gate.weight", "gate.bias") if name in state]
    missing = [name for name in ("prompt_embeddings", "gate.weight", "gate.bias") if name not in state]
    if "prompt_embeddings" in missing or len(gate) == 1:
        raise UserError(f"Not a checkpoint of DMP's released code: no {', '.join(missing)} in it.")
    shapes = {name: list(state[name].shape) for name in ("prompt_embeddings", *gate, "w_noise") if name in state}
    if len(shapes["prompt_embeddings"]) != 3 or 0 in shapes["prompt_embeddings"]:
        raise UserError(
            f"Not a checkpoint of DMP's released code: prompt_embeddings is {shapes['prompt_embeddings']}, expected "
            f"[L, N, D]."
        )
    num_sites, num_tokens, channels = shapes["prompt_embeddings"]
    side = round(num_tokens**0.5)
    if side**2 != num_tokens:
        raise UserError(
            f"prompt_embeddings is {shapes['prompt_embeddings']}: {num_tokens} prompts a block are no square of image "
            f"tokens. They were prepended, which is not read."
        )
    # Its gate always sees the block's index; the noise on its logits does not.
    expected = {
        "gate.weight": [num_tokens, channels + 1],
        "gate.bias": [num_tokens],
        "w_noise": [channels, num_tokens],
    }
    for name, shape in shapes.items():
        if shape != expected.get(name, shape):
            raise UserError(f"Not a checkpoint of DMP's released code: {name} is {shape}, expected {expected[name]}.")
    if not 0.0 < top_k <= 1.0:
        raise UserError(f"top_k={top_k} must be a share of the prompts, above 0 and at most 1.")
    names = [f"blocks.{index}" for index in range(num_sites)]
    sites = tuple(Site(name, name, index, channels, (side, side)) for index, name in enumerate(names))
    taps = ("y_embedder",) if any(name.startswith("y_embedder.") for name in state) else ()
    config = PatchConfig(
        preset="released",
        sites=num_sites,
        gate="linear" if gate else "none",
        gate_noise="w_noise" in state,
    )
    if top_k < 1.0:
        config = replace(config, selection="hard", top_k=int(top_k * num_tokens))  # rounded down there
    patch = patch_class(config, Backbone("DiT", sites, "t_embedder", taps, channels, (side, side)))
    tensors = {f"prompts.{site.name}": state["prompt_embeddings"][site.index] for site in sites}
    tensors |= {name: state[name] for name in gate}
    if "w_noise" in state:
        tensors["gate.noise_weight"] = state["w_noise"].T
    patch.fill(tensors, "the released checkpoint")
    return patch.eval()
