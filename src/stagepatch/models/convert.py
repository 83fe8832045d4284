"""Others' DiT checkpoints as the config and the weights of ours."""

from __future__ import annotations

import re
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
_BLOCK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]*)\.", re.ASCII)
_SHARED = ("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "norm_eps")


def load_original_state_dict(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint file or mapping, taken from under `ema` or `model` where it is there.

    What is no tensor, such as the number of an epoch, is left out.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    path = Path(checkpoint) if isinstance(checkpoint, (str, Path)) else None
    content = checkpoint if isinstance(checkpoint, Mapping) else _read_checkpoint(Path(checkpoint))
    nested = (content[key] for key in ("ema", "model") if isinstance(content.get(key), Mapping))
    found: Mapping[Any, Any] = next(nested, content)
    if nameless := [name for name in found if not isinstance(name, str)]:
        raise UserError(f"Not a state dict: {nameless[0]!r} is no name of a tensor.")
    state = {name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    if path is not None:
        _check_held(state, path)
    return state


def _check_held(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of more numbers than their file has, such as one that is repeated without end."""
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
            raise UserError(f"'{path}' holds '{name}' as {tensor.layout} on {tensor.device}: expected plain numbers.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"'{path}' holds fewer numbers than the {list(tensor.shape)} of its '{name}'.")


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
    hidden_size, in_channels, patch_size, _ = _shape(state, "x_embedder.proj.weight", "D", "C", "p", "p")
    out_features, _ = _shape(state, "final_layer.linear.weight", "p·p·C", "D")
    mlp_size, _ = _shape(state, "blocks.0.mlp.fc1.weight", "M", "D")
    num_layers = _count_blocks(state)
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
        _, tokens, width = _shape(state, "pos_embed", "1", "N", "D")
        side = round(tokens**0.5)
        if side**2 != tokens or width != hidden_size:
            raise UserError(
                f"Not a DiT checkpoint: 'pos_embed' is {[1, tokens, width]}, expected a square's tokens "
                f"of {hidden_size} channels."
            )
        config["sample_size"] = side * patch_size
    if "y_embedder.embedding_table.weight" in state:
        # The last row is the null label: the authors' models are trained with label dropout.
        rows, _ = _shape(state, "y_embedder.embedding_table.weight", "classes + 1", "D")
        config |= {"conditioning": "class", "num_classes": rows - 1}
    elif "y_embedder.proj.weight" in state:
        _, width = _shape(state, "y_embedder.proj.weight", "D", "E")
        config |= {"conditioning": "text", "pooled_projection_dim": width}
    return config


def _shape(state: Mapping[str, Tensor], name: str, *expected: str) -> list[int]:
    """Of a tensor, which must be there and have as many sizes as are expected, none of them 0."""
    if name not in state:
        raise UserError(
            f"Not a DiT checkpoint: no key '{name}'. Expected the names of facebookresearch/DiT, found "
            f"{sorted(state)[:3]}…"
        )
    shape = list(state[name].shape)
    if len(shape) != len(expected) or 0 in shape:
        raise UserError(f"Not a DiT checkpoint: '{name}' is {shape}, expected [{', '.join(expected)}].")
    return shape


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    """The number of blocks, which must be numbered from 0 on without a gap."""
    numbers = set()
    for name in state:
        if match := _BLOCK_NAME.match(name):
            numbers.add(match[1])
        elif name.startswith("blocks."):
            raise UserError(f"Not a DiT checkpoint: '{name}' is of a block without a number.")
    if absent := [number for number in range(len(numbers)) if str(number) not in numbers]:
        last = max(numbers, key=lambda number: (len(number), number))
        raise UserError(f"Not a whole DiT checkpoint: it has no 'blocks.{absent[0]}', but 'blocks.{last}'.")
    return len(numbers)


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
