"""A frozen base held in less memory, by what diffusers has for it.

All of it is for linear layers inside the model's blocks, which are nearly all of a transformer: embedders, norms,
modulation by parameters and the final layer, and so what a patch's gate sees, stay as they are. A weight that is
changed between a forward and its backward is safe there: autograd keeps a view of what a linear layer computed with,
where a convolution would find its own weight changed.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from torch import nn

from stagepatch.checkpoints.memory_config import MemoryConfig
from stagepatch.core import UserError, as_user_error, processes
from stagepatch.families import describe

_STORED = torch.float8_e4m3fn
# What diffusers raises on a GGUF file of something else.
_UNREADABLE = (OSError, ValueError, LookupError, RuntimeError)


def block_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers inside a model's blocks, by path. Blocks are the sites of its description."""
    blocks = tuple(f"{site.module}." for site in describe(model).sites)
    linear = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return {path: module for path, module in linear if path.startswith(blocks)}


def check_available(memory: MemoryConfig) -> None:
    """Refuse what cannot be had here.

    Raises:
        UserError: no such file, a library that is not installed, or no accelerator.
    """
    quantization, path = memory.quantization, Path(memory.gguf)
    if memory.gguf and (path.suffix != ".gguf" or not path.is_file()):
        raise UserError(f"memory.gguf='{path}' is no GGUF file.")
    library = "gguf" if memory.gguf else quantization.partition("_")[0]
    what = "memory.gguf" if memory.gguf else f"memory.quantization='{quantization}'"
    if library != "none" and find_spec(library) is None:
        raise UserError(f"{what} needs {library}, which is not installed: pip install 'stagepatch[quantization]'")
    needy = "memory.group_offload" if memory.group_offload else what if library == "bitsandbytes" else ""
    if needy and processes().device.type == "cpu":
        raise UserError(f"{needy} needs an accelerator, and there is none here.")


def quantization_of(memory: MemoryConfig, dtype: torch.dtype, shape: Any) -> Any:
    """diffusers' config of a quantisation.

    Args:
        dtype: that the layers compute in.
        shape: the model, on any device.

    """
    library, _, kind = memory.quantization.partition("_")
    kept = _left_out(shape)
    if library == "bitsandbytes":
        from diffusers import BitsAndBytesConfig

        if kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
        )
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
    return TorchAoConfig(kinds[kind](), modules_to_not_convert=kept)


def _left_out(model: Any) -> list[str]:
    """Paths of linear layers outside the blocks.

    diffusers looks for a path in those of all layers: one that is also a part of a block's is quantised with it.
    """
    inside = block_layers(model)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    outside = [path for path in linear if path not in inside]
    return [path for path in outside if not any(f".{path}." in f".{other}." for other in inside)]


def load_gguf(model_class: Any, directory: Path, path: Path, dtype: torch.dtype) -> Any:
    """A model of the config in a directory, in eval mode, with the weights of a GGUF file.

    Args:
        dtype: that it computes in.

    Raises:
        UserError: a class that diffusers reads no such file of, or a file that is broken or of another model.
    """
    from diffusers import GGUFQuantizationConfig

    if not hasattr(model_class, "from_single_file"):
        raise UserError(f"diffusers reads no GGUF file of {model_class.__name__}: leave out memory.gguf='{path}'.")
    config = {"config": str(directory), "quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)}
    with as_user_error(f"'{path}' holds no {model_class.__name__} of this config", *_UNREADABLE):
        model = model_class.from_single_file(str(path), torch_dtype=dtype, **config).eval()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise UserError(f"'{path}' does not hold all of this {model_class.__name__}: {missing[0]} is missing.")
    return model


def hold(model: Any, memory: MemoryConfig, dtype: torch.dtype) -> Any:
    """A loaded model with the rest of what a config asks for; returns it."""
    if memory.layerwise_casting:
        for layer in block_layers(model).values():
            apply_layerwise_casting_hook(layer, _STORED, dtype, non_blocking=False)
    if memory.group_offload:
        offload_layers(model, processes().device)
    return model


def offload_layers(model: Any, device: torch.device) -> None:
    """Keep each linear layer of the blocks off a device but while it computes; all else goes there for good."""
    layers = block_layers(model)
    for layer in layers.values():
        apply_group_offloading(layer, device, offload_type="leaf_level")
    for path, module in model.named_modules():
        if path not in layers:
            module._apply(partial(torch.Tensor.to, device=device), recurse=False)


def is_offloaded(model: Any) -> bool:
    """Whether diffusers moves parts of a model by itself, so that nothing else may."""
    return bool(_is_group_offload_enabled(model))


def on_device(model: Any, device: torch.device) -> Any:
    """The model, moved where it may be."""
    return model if is_offloaded(model) else model.to(device)


def has_plain_weights(model: nn.Module) -> bool:
    """Whether all weights are floats of 16 bits or more, which can be trained, overwritten and compared."""
    return all(is_plain(parameter) for parameter in model.parameters())


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is that, and no library's own kind; shared among processes (DTensor) or not."""
    is_own = type(parameter) is nn.Parameter or hasattr(parameter, "full_tensor")
    return is_own and parameter.is_floating_point() and parameter.element_size() > 1
