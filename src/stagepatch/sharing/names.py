"""Names of a LoRA's tensors in diffusers, kohya's scripts and ComfyUI.

A LoRA is here its layers by the paths that diffusers' class gives them, each (down [R, in], up [out, R]), whose
product up · down is added to the weight as it is. Of kohya's forms there are those that diffusers' own loaders read,
which is what they are tested against. ComfyUI's are written from its `comfy/lora.py` (commit 17358c8), which names
diffusers' layers itself for the classes below.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from stagepatch.core import UserError

Layers = dict[str, tuple[Tensor, Tensor]]

# Flux's own names, the layers of diffusers that they hold side by side, and the share of the outputs that each has.
_FLUX_DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
}
_FLUX_SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
_FLUX2_DOUBLE = {
    **{name: ours for name, ours in _FLUX_DOUBLE.items() if "attn" in name},
    "img_mlp.0": ["ff.linear_in"],
    "img_mlp.2": ["ff.linear_out"],
    "txt_mlp.0": ["ff_context.linear_in"],
    "txt_mlp.2": ["ff_context.linear_out"],
}
_FLUX2_SINGLE = {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]}
_FLUX_SHARES = {"proj_mlp": 4}
_WAN = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def to_diffusers(layers: Layers, model_class: str) -> dict[str, Tensor]:
    """Names that `pipe.load_lora_weights` reads: 'transformer.…lora_A.weight', or 'unet.…'."""
    return _peft(layers, "unet." if model_class.startswith("UNet") else "transformer.")


def to_kohya(layers: Layers, model_class: str) -> dict[str, Tensor]:
    """Names of kohya's scripts: 'lora_unet_….lora_down.weight', '….lora_up.weight', '….alpha'.

    Raises:
        UserError: the class, or a layer, has no name in them.
    """
    tensors = {}
    for path, (down, up) in _renamed(_KOHYA, layers, model_class, "kohya").items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def to_comfyui(layers: Layers, model_class: str) -> dict[str, Tensor]:
    """Names that ComfyUI's 'Load LoRA' knows for the class: kohya's, diffusers', or those of its own modules.

    Raises:
        UserError: the class, or a layer, has no name in it.
    """
    if model_class == "UNet2DConditionModel":
        return to_kohya(layers, model_class)
    if model_class in _COMFYUI_AS_DIFFUSERS:
        return to_diffusers(layers, model_class)
    return _peft(_renamed(_COMFYUI_OWN, layers, model_class, "comfyui"), "diffusion_model.")


def _peft(layers: Layers, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for path, (down, up) in layers.items():
        tensors[f"{prefix}{path}.lora_A.weight"], tensors[f"{prefix}{path}.lora_B.weight"] = down, up
    return tensors


def _renamed(forms: Mapping[str, Callable[[Layers], Layers]], layers: Layers, model_class: str, target: str) -> Layers:
    if model_class not in forms:
        known = sorted({*forms, *(_COMFYUI_AS_DIFFUSERS if target == "comfyui" else ())})
        raise UserError(
            f"A LoRA for {model_class} has no form of {target}'s that is known here; known: {', '.join(known)}. Take "
            f"--to diffusers."
        )
    return forms[model_class](layers)


def _as_they_are(layers: Layers) -> Layers:
    return layers


def _wan(layers: Layers) -> Layers:
    renamed = {}
    for path, maps in layers.items():
        kind, number, layer = [*path.split(".", 2), "", ""][:3]
        where, _, what = layer.partition(".")
        name = _WAN.get(layer) or (f"{_WAN[where]}.{_WAN[what]}" if where in _WAN and what in _WAN else "")
        if kind != "blocks" or not name:
            raise UserError(f"Wan's layer '{path}' has no name in this form: train the blocks' layers alone.")
        renamed[f"blocks.{number}.{name}"] = maps
    return renamed


def _flux(layers: Layers, double: dict[str, list[str]], single: dict[str, list[str]]) -> Layers:
    """Layers that are one in Flux's own code stand side by side in one map, of the sum of their ranks."""
    blocks = {"transformer_blocks": ("double_blocks", double), "single_transformer_blocks": ("single_blocks", single)}
    rest, fused = dict(layers), {}
    for path in layers:
        kind, number = [*path.split("."), ""][:2]
        theirs, table = blocks.get(kind, ("", {}))
        for name, ours in table.items():
            parts = [rest.pop(f"{kind}.{number}.{each}", None) for each in ours]
            if any(part is not None for part in parts):
                fused[f"{theirs}.{number}.{name}"] = _side_by_side(parts, [_FLUX_SHARES.get(each, 1) for each in ours])
    if rest:
        raise UserError(f"Flux's layer '{min(rest)}' has no name in this form: train the blocks' layers alone.")
    return fused


def _side_by_side(parts: list[tuple[Tensor, Tensor] | None], shares: list[int]) -> tuple[Tensor, Tensor]:
    """Maps of one input as one map of their outputs, each by its own ranks; zeros for one that is not there."""
    given, share = next((part, share) for part, share in zip(parts, shares, strict=True) if part is not None)
    down, up = given
    width, rank = len(up) // share, len(down)
    blank = torch.zeros_like(down)
    whole = [part or (blank, up.new_zeros(width * share, rank)) for part, share in zip(parts, shares, strict=True)]
    if len(whole) == 1:
        return whole[0]
    return torch.cat([each[0] for each in whole]), torch.block_diag(*(each[1] for each in whole))


_FLUX2 = partial(_flux, double=_FLUX2_DOUBLE, single=_FLUX2_SINGLE)
_KOHYA: dict[str, Callable[[Layers], Layers]] = {
    "UNet2DConditionModel": _as_they_are,
    "FluxTransformer2DModel": partial(_flux, double=_FLUX_DOUBLE, single=_FLUX_SINGLE),
    "Flux2Transformer2DModel": _FLUX2,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _as_they_are,
    "ZImageTransformer2DModel": _as_they_are,
}
_COMFYUI_OWN: dict[str, Callable[[Layers], Layers]] = {
    "Flux2Transformer2DModel": _FLUX2,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _as_they_are,
}
_COMFYUI_AS_DIFFUSERS = (
    "AuraFlowTransformer2DModel",
    "FluxTransformer2DModel",
    "Krea2Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "ZImageTransformer2DModel",
)
FORMS = {"diffusers": to_diffusers, "kohya": to_kohya, "comfyui": to_comfyui}
