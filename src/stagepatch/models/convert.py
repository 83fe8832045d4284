"""Others' DiT checkpoints as the config and the weights of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stagepatch.core import UserError, read_tensors
from stagepatch.models.sizes import DIT_SIZES

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


# Of diffusers' DiT: what its config must say, what both configs have, and a block's layers by our names.
_REQUIRED = {
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_SHARED = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "norm_eps")


def load_original_state_dict(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file or mapping, taken from under `ema` or `model` where it is there.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    content = _read_checkpoint(Path(checkpoint)) if isinstance(checkpoint, (str, Path)) else checkpoint
    nested = (content[key] for key in ("ema", "model") if isinstance(content.get(key), Mapping))
    state: Mapping[str, Any] = next(nested, content)
    return {name.removeprefix("module."): value for name, value in state.items()}


def _read_checkpoint(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise UserError(f"No such checkpoint: '{path}'.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken pickle raises depends on where it breaks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Cannot read '{path}' as tensors alone: {reason}. It may be truncated, or hold "
            f"Python objects (such as argparse's Namespace), which are not loaded because they can run code; "
            f"save its state dict by itself."
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"'{path}' holds {type(checkpoint).__name__}, not a state dict.")
    return checkpoint


def original_config(state: Mapping[str, Tensor], num_attention_heads: int | None = None) -> dict[str, Any]:
    """Config of a checkpoint of facebookresearch/DiT, as its shapes tell it; see `DiT.from_original`."""
    try:
        embedder = state["x_embedder.proj.weight"]
        out_features = state["final_layer.linear.weight"].shape[0]
        mlp_size = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"Not a DiT checkpoint: no key {error}. Expected the names of facebookresearch/DiT, "
            f"found {sorted(state)[:3]}…"
        ) from error
    hidden_size, in_channels, patch_size, _ = embedder.shape
    num_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config: dict[str, Any] = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads or _named_heads(hidden_size, num_layers),
        "mlp_ratio": mlp_size / hidden_size,
        "learn_sigma": out_features == 2 * in_channels * patch_size**2,
        "conditioning": "none",
    }
    if "pos_embed" in state:
        config["sample_size"] = round(state["pos_embed"].shape[-2] ** 0.5) * patch_size
    if "y_embedder.embedding_table.weight" in state:
        # The last row is the null label: the authors' models are trained with label dropout.
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        config |= {"conditioning": "class", "num_classes": rows - 1}
    elif "y_embedder.proj.weight" in state:
        config |= {"conditioning": "text", "pooled_projection_dim": state["y_embedder.proj.weight"].shape[1]}
    return config


def _named_heads(hidden_size: int, num_layers: int) -> int:
    for size in DIT_SIZES.values():
        if (size["hidden_size"], size["num_layers"]) == (hidden_size, num_layers):
            return size["num_attention_heads"]
    raise UserError(
        f"A DiT of width {hidden_size} and {num_layers} layers is none of the named sizes, and a checkpoint does "
        f"not tell the number of attention heads: pass num_attention_heads."
    )


def read_diffusers(model: DiTTransformer2DModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of diffusers' DiT; see `DiT.from_diffusers`."""
    config = model.config
    for name, expected in _REQUIRED.items():
        if config[name] != expected:
            raise UserError(f"Cannot convert a DiT with {name}={config[name]!r}: expected {expected!r}.")
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"Cannot convert a DiT with out_channels={out_channels} for in_channels={config.in_channels}: "
            f"expected as many, or twice as many (learned variance)."
        )
    ours = {
        **{name: config[name] for name in _SHARED},
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "num_classes": config.num_embeds_ada_norm,
        "learn_sigma": out_channels == 2 * config.in_channels,
        "downscale_freq_shift": 1.0,
    }
    return ours, _rename_diffusers(model.state_dict(), config.num_layers)


def _rename_diffusers(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    embedder = "transformer_blocks.0.norm1.emb"
    for name in (name for name in state if name.startswith(embedder)):
        for index in range(1, num_layers):
            if not torch.equal(state[name], state[name.replace(".0.", f".{index}.", 1)]):
                raise UserError(
                    f"Cannot convert: block {index} has an embedder of its own ('{name}' differs from block 0's). "
                    f"A DiT has one for all blocks."
                )
    sources = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{embedder}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{embedder}.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    renamed = {"y_embedder.embedding_table.weight": state[f"{embedder}.class_embedder.embedding_table.weight"]}
    for index in range(num_layers):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        sources |= {f"{ours}.{name}": f"{theirs}.{source}" for name, source in _BLOCK.items()}
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            renamed[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, source in sources.items():
        renamed |= {f"{name}.{kind}": state[f"{source}.{kind}"] for kind in ("weight", "bias")}
    return renamed
