"""Tiny models of every family, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from stagepatch.models import DiT

TEXT = 5  # tokens of text


@dataclass
class Family:
    """How to build a tiny model, and how to call it.

    Args:
        build: the class and its arguments.
        inputs: (model, batch, height, width) -> keyword arguments of a forward, for latents of that size.
        size: height and width of the model's own latents.
        blocks: number of sites that 'all' means.
        only_square: the model itself takes no other shapes.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int, int], dict[str, Any]]
    blocks: int
    size: tuple[int, int] = (8, 8)
    only_square: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """Frozen, in eval mode; every weight is drawn, since zeros at the end of blocks would hide them."""
        torch.manual_seed(seed)
        model = self.build().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def call(self, model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None, **changes: Any) -> Tensor:
        generator_state = torch.get_rng_state()
        torch.manual_seed(1)
        inputs = {**self.inputs(model, batch, *(size or self.size)), **changes}
        torch.set_rng_state(generator_state)
        dtype = next(model.parameters()).dtype
        inputs = {name: _cast(value, dtype) for name, value in inputs.items()}
        return model(**inputs, return_dict=False)[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def timesteps(batch: int) -> Tensor:
    return torch.linspace(900, 10, batch).round()


def latents(batch: int, height: int, width: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, height, width)


def dit() -> nn.Module:
    return DiT(sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=10)


def dit_inputs(model, batch, height, width):
    return {"sample": latents(batch, height, width), "timestep": timesteps(batch), "class_labels": labels(batch)}


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % 10


def diffusers_dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=10,
    )


def diffusers_dit_inputs(model, batch, height, width):
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch).long(),
        "class_labels": labels(batch),
    }


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def unet_inputs(model, batch, height, width):
    return {"sample": latents(batch, height, width), "timestep": timesteps(batch).long()}


def text_unet(**changes: Any) -> nn.Module:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def text(batch: int, channels: int) -> Tensor:
    return torch.randn(batch, TEXT, channels)


def text_unet_inputs(model, batch, height, width):
    return {**unet_inputs(model, batch, height, width), "encoder_hidden_states": text(batch, 24)}


def sdxl_unet() -> nn.Module:
    return text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
    )


def sdxl_inputs(model, batch, height, width):
    added = {"text_embeds": torch.randn(batch, 12), "time_ids": torch.arange(6.0).repeat(batch, 1)}
    return {**text_unet_inputs(model, batch, height, width), "added_cond_kwargs": added}


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        use_additional_conditions=False,
    )


def pixart_inputs(model, batch, height, width):
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch).long(),
        "encoder_hidden_states": text(batch, 24),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def sd3_inputs(model, batch, height, width):
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch),
        "encoder_hidden_states": text(batch, 24),
        "pooled_projections": torch.randn(batch, 12),
    }


def flux(guidance: bool = True) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )


def flux_inputs(model, batch, height, width):
    rows, columns = height // 2, width // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return {
        "hidden_states": torch.randn(batch, rows * columns, 16),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": text(batch, 24),
        "pooled_projections": torch.randn(batch, 12),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
    )


def sana_inputs(model, batch, height, width):
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch),
        "encoder_hidden_states": text(batch, 24),
    }


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 32, 32),
        cap_feat_dim=24,
    )


def lumina2_inputs(model, batch, height, width):
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[-1, 2:] = False  # captions of different lengths
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": text(batch, 24),
        "encoder_attention_mask": mask,
    }


def auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )


def auraflow_inputs(model, batch, height, width):
    return {
        "hidden_states": latents(batch, height, width),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": text(batch, 24),
    }


def qwenimage() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )


def qwenimage_inputs(model, batch, height, width):
    rows, columns = height // 2, width // 2
    return {
        "hidden_states": torch.randn(batch, rows * columns, 16),
        "timestep": timesteps(batch) / 1000,
        "encoder_hidden_states": text(batch, 24),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=32,
    )


FRAMES = 3


def wan_inputs(model, batch, height, width):
    return {
        "hidden_states": torch.randn(batch, 4, FRAMES, height, width),
        "timestep": timesteps(batch).long(),
        "encoder_hidden_states": text(batch, 24),
    }


FAMILIES = {
    "DiT": Family(dit, dit_inputs, 2),
    "DiTTransformer2DModel": Family(diffusers_dit, diffusers_dit_inputs, 2, only_square=True),
    "UNet2DModel": Family(unet, unet_inputs, 5),
    "UNet2DConditionModel": Family(text_unet, text_unet_inputs, 5),
    "UNet2DConditionModel of SDXL": Family(sdxl_unet, sdxl_inputs, 5),
    "PixArtTransformer2DModel": Family(pixart, pixart_inputs, 2),
    "SD3Transformer2DModel": Family(sd3, sd3_inputs, 2),
    "FluxTransformer2DModel": Family(flux, flux_inputs, 2),
    "SanaTransformer2DModel": Family(sana, sana_inputs, 2, size=(4, 4)),
    "Lumina2Transformer2DModel": Family(lumina2, lumina2_inputs, 3),
    "AuraFlowTransformer2DModel": Family(auraflow, auraflow_inputs, 2),
    "QwenImageTransformer2DModel": Family(qwenimage, qwenimage_inputs, 2),
    "WanTransformer3DModel": Family(wan, wan_inputs, 2),
}
