"""Tiny models of every family, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.models import DiT

TEXT = 5  # tokens of text
TEXT_CHANNELS = 24
FRAMES = 3

# Of an input of a forward, from batch, height and width of the latents.
Draw = Callable[[int, int, int], Any]


@dataclass
class Family:
    """How to build a tiny model, and how to call it.

    Args:
        model_class, config: of the model.
        draws: of a forward's inputs by name, in the order in which they are drawn.
        blocks: number of sites that 'all' means.
        size: height and width of the model's own latents.
        only_square: the model itself takes no other shapes.
        others: tokens before the image's at sites where it is the last.
    """

    model_class: Any
    config: dict[str, Any]
    draws: dict[str, Draw]
    blocks: int = 2
    size: tuple[int, int] = (8, 8)
    only_square: bool = False
    others: int = 0

    @property
    def timestep(self) -> str:
        """What the forward calls it."""
        return next(name for name in ("timestep", "timesteps", "t") if name in self.draws)

    def build(self, **changes: Any) -> nn.Module:
        """The model as its class initialises it, its config changed."""
        model = self.model_class(**self.config)
        return (
            self.model_class.from_config({**model.config, "_use_default_values": [], **changes}) if changes else model
        )

    def model(self, seed: int = 0, **changes: Any) -> nn.Module:
        """Frozen, in eval mode; every weight is drawn, since zeros at the end of blocks would hide them."""
        torch.manual_seed(seed)
        model = self.build(**changes).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def inputs(self, model: nn.Module, batch: int, height: int, width: int) -> dict[str, Any]:
        """Keyword arguments of a forward, for latents of that size."""
        return {name: draw(batch, height, width) for name, draw in self.draws.items()}

    def call(self, model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None, **changes: Any) -> Tensor:
        generator_state = torch.get_rng_state()
        torch.manual_seed(1)
        inputs = {**self.inputs(model, batch, *(size or self.size)), **changes}
        torch.set_rng_state(generator_state)
        dtype = next(model.parameters()).dtype
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                inputs[name] = value.to(dtype)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                inputs[name] = [row.to(dtype) if row.is_floating_point() else row for row in value]
        output: Any = model(**inputs, return_dict=False)
        output = output if isinstance(output, Tensor) else output[0]
        return torch.stack(output) if isinstance(output, list) else output


def draw(*shape: int) -> Draw:
    return lambda batch, height, width: torch.randn(batch, *shape)


def latents(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 4, height, width)


def packed(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, height // 2 * (width // 2), 16)


def timesteps(batch: int, height: int = 0, width: int = 0) -> Tensor:
    return torch.linspace(900, 10, batch).round()


def flat(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, height * width, 4)


def text_and_slots(batch: int, height: int, width: int) -> Tensor:
    """False for each token of text, then True for every four of the image's."""
    return (torch.arange(TEXT + height * width // 4) >= TEXT).expand(batch, -1)


def whole_timesteps(batch: int, height: int, width: int) -> Tensor:
    return timesteps(batch).long()


def fractions(batch: int, height: int, width: int) -> Tensor:
    return timesteps(batch) / 1000


def labels(batch: int, height: int, width: int) -> Tensor:
    return torch.arange(batch) % 10


def videos(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 4, FRAMES, height, width)


def mask_of_different_lengths(batch: int, height: int, width: int) -> Tensor:
    return torch.arange(TEXT) < torch.tensor([TEXT] * (batch - 1) + [2])[:, None]


def mask_over_the_image(batch: int, height: int, width: int) -> Tensor:
    image = torch.ones(batch, height // 2 * (width // 2))
    return torch.cat([mask_of_different_lengths(batch, height, width).float(), image], dim=1)


def mask_of_fibo(batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {"attention_mask": mask_over_the_image(batch, 2 * height, 2 * width).bool()[:, None, None]}


def conditions_of_sdxl(batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {"text_embeds": torch.randn(batch, 12), "time_ids": torch.arange(6.0).repeat(batch, 1)}


def embeds_of_images(batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {"image_embeds": torch.randn(batch, 12)}


def positions(batch: int, height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float().flatten(0, 1)


def diagonal(batch: int, height: int, width: int) -> Tensor:
    """Positions of text."""
    return torch.arange(TEXT)[:, None] * torch.tensor([0, 1, 1])


def positions_with_text(batch: int, height: int, width: int) -> Tensor:
    """Of FLUX.2: image, row, column, place in the text."""
    return torch.nn.functional.pad(positions(batch, height, width), (0, 1)).expand(batch, -1, -1)


def text_before_image(batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, segments and roles, as Ideogram 4's pipeline makes them."""
    lengths = [TEXT] * (batch - 1) + [2]
    return diffusers.Ideogram4Pipeline._prepare_ids(lengths, height // 2, width // 2, TEXT, torch.device("cpu"))


text = draw(TEXT, TEXT_CHANNELS)
pooled = draw(12)

LATENTS = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LAYERS = {"num_layers": 2, **HEADS}
DIT = {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
POOLED = {"pooled_projection_dim": 12}
JOINT = {"joint_attention_dim": TEXT_CHANNELS}
CAPTIONS = {"cross_attention_dim": 32, "caption_channels": TEXT_CHANNELS}
ROPE = {"axes_dims_rope": (4, 4, 8)}
UNET_INPUTS = {"sample": latents, "timestep": whole_timesteps}
PACKED_INPUTS = {"hidden_states": packed, "timestep": fractions, "encoder_hidden_states": text}
FLUX = {**HEADS, **ROPE, **JOINT, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
FLUX_INPUTS = {**PACKED_INPUTS, "img_ids": positions, "txt_ids": lambda *_: torch.zeros(TEXT, 3)}
FLUX2 = {**HEADS, **JOINT, "axes_dims_rope": (4, 4, 4, 4), "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
FLUX2_INPUTS = {
    **PACKED_INPUTS,
    "img_ids": positions_with_text,
    "txt_ids": lambda batch, *_: torch.nn.functional.pad(torch.arange(TEXT)[:, None], (3, 0)).expand(batch, -1, -1),
}
TEXT_INPUTS = {"hidden_states": latents, "timestep": timesteps, "encoder_hidden_states": text}

COGVIEW = {**LATENTS, **LAYERS, "text_embed_dim": TEXT_CHANNELS, "time_embed_dim": 16, "condition_dim": 8}
COGVIEW_INPUTS = {
    **TEXT_INPUTS,
    "original_size": lambda batch, *_: torch.tensor([[64.0, 48.0]]).repeat(batch, 1),
    "target_size": lambda batch, *_: torch.tensor([[32.0, 64.0]]).repeat(batch, 1),
    "crop_coords": lambda batch, *_: torch.tensor([[0.0, 8.0]]).repeat(batch, 1),
}


def config(*shared: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What several models share, and what is this one's."""
    return {name: value for part in (*shared, more) for name, value in part.items()}


def unet(*kinds: str, **more: Any) -> dict[str, Any]:
    """A U-Net's config, from the kinds of its blocks, the outermost first."""
    down = tuple(f"{kind}DownBlock2D" for kind in kinds)
    up = tuple(f"{kind}UpBlock2D" for kind in reversed(kinds))
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    return config(LATENTS, sizes, more, down_block_types=down, up_block_types=up)


text_unet = partial(unet, "CrossAttn", "", cross_attention_dim=TEXT_CHANNELS)

# Text, or an image's embedding, is among the keys of self-attention, as in DeepFloyd IF and Kandinsky 2.2.
added_unet = {
    **unet(out_channels=8, cross_attention_dim=16, resnet_time_scale_shift="scale_shift"),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}

FAMILIES = {
    "DiT": Family(DiT, {**DIT, "num_classes": 10}, {"sample": latents, "timestep": timesteps, "class_labels": labels}),
    "DiTTransformer2DModel": Family(
        diffusers.DiTTransformer2DModel,
        {**LATENTS, **LAYERS, "num_embeds_ada_norm": 10},
        {"hidden_states": latents, "timestep": whole_timesteps, "class_labels": labels},
        only_square=True,
    ),
    "UNet2DModel": Family(diffusers.UNet2DModel, unet("", "Attn"), UNET_INPUTS, blocks=5),
    "UNet2DConditionModel": Family(
        diffusers.UNet2DConditionModel, text_unet(), {**UNET_INPUTS, "encoder_hidden_states": text}, blocks=5
    ),
    "UNet2DConditionModel of SDXL": Family(
        diffusers.UNet2DConditionModel,
        text_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 12,
            transformer_layers_per_block=(2, 1),
            use_linear_projection=True,
        ),
        {"added_cond_kwargs": conditions_of_sdxl, **UNET_INPUTS, "encoder_hidden_states": text},
        blocks=5,
    ),
    "PixArtTransformer2DModel": Family(
        diffusers.PixArtTransformer2DModel,
        config(LATENTS, LAYERS, CAPTIONS, out_channels=8, use_additional_conditions=False),
        {
            **TEXT_INPUTS,
            "timestep": whole_timesteps,
            "added_cond_kwargs": lambda *_: {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": Family(
        diffusers.SD3Transformer2DModel,
        config(LATENTS, LAYERS, JOINT, POOLED, caption_projection_dim=32, pos_embed_max_size=16, qk_norm="rms_norm"),
        {**TEXT_INPUTS, "pooled_projections": pooled},
    ),
    "FluxTransformer2DModel": Family(
        diffusers.FluxTransformer2DModel,
        config(HEADS, ROPE, JOINT, POOLED, in_channels=16, num_layers=1, num_single_layers=1, guidance_embeds=True),
        {
            "hidden_states": packed,
            "timestep": fractions,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "img_ids": positions,
            "txt_ids": lambda *_: torch.zeros(TEXT, 3),
            "guidance": lambda batch, *_: torch.full((batch,), 3.5),
        },
    ),
    "SanaTransformer2DModel": Family(
        diffusers.SanaTransformer2DModel,
        config(
            LATENTS,
            LAYERS,
            CAPTIONS,
            sample_size=4,
            patch_size=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
        ),
        TEXT_INPUTS,
        size=(4, 4),
    ),
    "Lumina2Transformer2DModel": Family(
        diffusers.Lumina2Transformer2DModel,
        config(
            DIT,
            num_refiner_layers=1,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(32, 32, 32),
            cap_feat_dim=TEXT_CHANNELS,
        ),
        {**TEXT_INPUTS, "timestep": fractions, "encoder_attention_mask": mask_of_different_lengths},
        blocks=3,
    ),
    "AuraFlowTransformer2DModel": Family(
        diffusers.AuraFlowTransformer2DModel,
        config(
            LATENTS,
            HEADS,
            JOINT,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        {**TEXT_INPUTS, "timestep": fractions},
        others=8 + TEXT,
    ),
    "QwenImageTransformer2DModel": Family(
        diffusers.QwenImageTransformer2DModel,
        config(LAYERS, ROPE, JOINT, in_channels=16, out_channels=4),
        {
            "hidden_states": packed,
            "timestep": fractions,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": lambda batch, *_: torch.ones(batch, TEXT, dtype=torch.bool),
            "img_shapes": lambda batch, height, width: [[(1, height // 2, width // 2)]] * batch,
        },
    ),
    "WanTransformer3DModel": Family(
        diffusers.WanTransformer3DModel,
        config(
            LAYERS, in_channels=4, out_channels=4, text_dim=TEXT_CHANNELS, freq_dim=16, ffn_dim=32, rope_max_seq_len=32
        ),
        {
            **TEXT_INPUTS,
            "hidden_states": lambda batch, *size: torch.randn(batch, 4, FRAMES, *size),
            "timestep": whole_timesteps,
        },
    ),
    "Flux2Transformer2DModel": Family(
        diffusers.Flux2Transformer2DModel,
        config(FLUX2, guidance_embeds=True),
        {**FLUX2_INPUTS, "guidance": lambda batch, *_: torch.full((batch,), 3.5)},
    ),
    "Flux2Transformer2DModel of klein": Family(
        diffusers.Flux2Transformer2DModel, config(FLUX2, guidance_embeds=False), FLUX2_INPUTS
    ),
    "ChromaTransformer2DModel": Family(
        diffusers.ChromaTransformer2DModel,
        config(FLUX, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1),
        {**FLUX_INPUTS, "attention_mask": mask_over_the_image},
    ),
    "HiDreamImageTransformer2DModel": Family(
        diffusers.HiDreamImageTransformer2DModel,
        config(
            HEADS,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[TEXT_CHANNELS, TEXT_CHANNELS],
            text_emb_dim=12,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(16, 16),
            llama_layers=[0, 1],
        ),
        {
            "hidden_states": latents,
            "timesteps": timesteps,
            "encoder_hidden_states_t5": text,
            "encoder_hidden_states_llama3": lambda batch, *_: torch.randn(2, batch, TEXT, TEXT_CHANNELS),
            "pooled_embeds": pooled,
        },
    ),
    "OvisImageTransformer2DModel": Family(
        diffusers.OvisImageTransformer2DModel, config(FLUX, out_channels=16), {**FLUX_INPUTS, "txt_ids": diagonal}
    ),
    "LongCatImageTransformer2DModel": Family(
        diffusers.LongCatImageTransformer2DModel,
        config(FLUX),
        {
            **FLUX_INPUTS,
            "img_ids": lambda *size: positions(*size) + torch.tensor([1, TEXT, TEXT]),
            "txt_ids": diagonal,
        },
    ),
    "BriaTransformer2DModel": Family(diffusers.BriaTransformer2DModel, FLUX, {**FLUX_INPUTS, "timestep": timesteps}),
    "BriaFiboTransformer2DModel": Family(
        diffusers.BriaFiboTransformer2DModel,
        config(FLUX, in_channels=4, joint_attention_dim=2 * TEXT_CHANNELS, text_encoder_dim=TEXT_CHANNELS),
        {
            "hidden_states": lambda batch, height, width: torch.randn(batch, height * width, 4),
            "timestep": timesteps,
            "encoder_hidden_states": draw(TEXT, 2 * TEXT_CHANNELS),
            "text_encoder_layers": lambda batch, *_: [torch.randn(batch, TEXT, TEXT_CHANNELS) for _ in range(2)],
            "img_ids": lambda batch, height, width: positions(batch, 2 * height, 2 * width),
            "txt_ids": lambda *_: torch.zeros(TEXT, 3),
            "joint_attention_kwargs": mask_of_fibo,
        },
    ),
    "OmniGenTransformer2DModel": Family(
        diffusers.OmniGenTransformer2DModel,
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 50,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
        },
        {
            "hidden_states": latents,
            "timestep": fractions,
            "input_ids": lambda batch, *_: torch.arange(1, TEXT + 1).expand(batch, -1),
            "input_img_latents": lambda *_: [],
            "input_image_sizes": lambda *_: {},
            "attention_mask": lambda batch, height, width: torch.ones(batch, *[TEXT + 1 + height * width // 4] * 2),
            "position_ids": lambda batch, height, width: torch.arange(TEXT + 1 + height * width // 4).expand(
                batch, -1
            ),
        },
    ),
    "ZImageTransformer2DModel": Family(
        diffusers.ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": TEXT_CHANNELS,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 32, 32],
        },
        {
            "x": lambda batch, *size: list(torch.randn(batch, 4, 1, *size)),
            "t": fractions,
            "cap_feats": lambda batch, *_: [torch.randn(TEXT - row % 3, TEXT_CHANNELS) for row in range(batch)],
        },
        blocks=3,
    ),
    "Krea2Transformer2DModel": Family(
        diffusers.Krea2Transformer2DModel,
        config(
            LAYERS,
            ROPE,
            in_channels=16,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=TEXT_CHANNELS,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
        ),
        {
            "hidden_states": packed,
            "encoder_hidden_states": draw(TEXT, 2, TEXT_CHANNELS),
            "timestep": fractions,
            "position_ids": lambda *size: torch.cat([torch.zeros(TEXT, 3), positions(*size)]),
            "encoder_attention_mask": mask_of_different_lengths,
        },
    ),
    "ErnieImageTransformer2DModel": Family(
        diffusers.ErnieImageTransformer2DModel,
        {
            "in_channels": 16,
            "out_channels": 16,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "text_in_dim": TEXT_CHANNELS,
            "rope_axes_dim": (4, 4, 8),
        },
        {
            "hidden_states": lambda batch, height, width: torch.randn(batch, 16, height // 2, width // 2),
            "timestep": timesteps,
            "text_bth": text,
            "text_lens": lambda *size: mask_of_different_lengths(*size).sum(dim=1),
        },
    ),
    "Ideogram4Transformer2DModel": Family(
        diffusers.Ideogram4Transformer2DModel,
        config(
            LAYERS,
            in_channels=16,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=TEXT_CHANNELS,
            mrope_section=(4, 2, 2),
        ),
        {
            "hidden_states": lambda *size: F.pad(packed(*size), (0, 0, TEXT, 0)),
            "timestep": fractions,
            "encoder_hidden_states": lambda batch, height, width: torch.randn(
                batch, TEXT + height * width // 4, TEXT_CHANNELS
            ),
            "position_ids": lambda *size: text_before_image(*size)[0],
            "segment_ids": lambda *size: text_before_image(*size)[1],
            "indicator": lambda *size: text_before_image(*size)[2],
        },
    ),
    "CogView4Transformer2DModel": Family(
        diffusers.CogView4Transformer2DModel, config(COGVIEW, rope_axes_dim=(8, 8)), COGVIEW_INPUTS
    ),
    "CogView3PlusTransformer2DModel": Family(
        diffusers.CogView3PlusTransformer2DModel, config(COGVIEW, pos_embed_max_size=16), COGVIEW_INPUTS
    ),
    "PRXTransformer2DModel": Family(
        diffusers.PRXTransformer2DModel,
        {
            "in_channels": 4,
            "context_in_dim": TEXT_CHANNELS,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
            "resolution_embeds": True,
        },
        {**TEXT_INPUTS, "timestep": fractions, "attention_mask": mask_of_different_lengths},
    ),
    "GlmImageTransformer2DModel": Family(
        diffusers.GlmImageTransformer2DModel,
        {
            **LAYERS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": TEXT_CHANNELS,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 16,
        },
        {
            **TEXT_INPUTS,
            "prior_token_id": lambda batch, height, width: torch.randint(16, (batch, height * width // 4)),
            "prior_token_drop": lambda batch, height, width: torch.rand(batch, height * width // 4) < 0.1,
            "target_size": COGVIEW_INPUTS["target_size"],
            "crop_coords": COGVIEW_INPUTS["crop_coords"],
        },
    ),
    # As ADM is built: classes, variances, residual blocks that change the size, scale and shift by the embedding.
    "UNet2DModel of ADM": Family(
        diffusers.UNet2DModel,
        unet(
            "",
            "Attn",
            out_channels=8,
            num_class_embeds=10,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        ),
        {**UNET_INPUTS, "class_labels": labels},
        blocks=5,
    ),
    # Fourier features of a noise level, as in NCSN++ and EDM2.
    "UNet2DModel of Fourier features": Family(
        diffusers.UNet2DModel,
        unet("", "Attn", time_embedding_type="fourier", num_class_embeds=10),
        {"sample": latents, "timestep": lambda batch, *_: torch.linspace(30.0, 0.3, batch), "class_labels": labels},
        blocks=5,
    ),
    "UNet2DConditionModel of Kandinsky 2.2": Family(
        diffusers.UNet2DConditionModel,
        {
            **added_unet,
            "addition_embed_type": "image",
            "encoder_hid_dim": 12,
            "encoder_hid_dim_type": "image_proj",
        },
        {**UNET_INPUTS, "encoder_hidden_states": lambda *_: None, "added_cond_kwargs": embeds_of_images},
        blocks=5,
    ),
    "UNet2DConditionModel of DeepFloyd IF": Family(
        diffusers.UNet2DConditionModel,
        {
            **added_unet,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "encoder_hid_dim": TEXT_CHANNELS,
            "encoder_hid_dim_type": "text_proj",
        },
        {**UNET_INPUTS, "encoder_hidden_states": text},
        blocks=5,
    ),
    "QwenImage21Transformer2DModel": Family(
        diffusers.QwenImage21Transformer2DModel,
        config(LAYERS, in_channels=4, out_channels=4, context_in_dim=TEXT_CHANNELS, axes_dims_rope=(4, 4, 8)),
        {
            "hidden_states": flat,
            "timestep": fractions,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": mask_of_different_lengths,
            "img_shapes": lambda batch, height, width: [[(1, height, width)]] * batch,
            "img_mask": text_and_slots,
        },
        others=TEXT,
    ),
}
FAMILIES["NucleusMoEImageTransformer2DModel"] = Family(
    diffusers.NucleusMoEImageTransformer2DModel,
    config(
        LAYERS,
        JOINT,
        in_channels=16,
        out_channels=4,
        axes_dims_rope=(4, 4, 8),
        num_key_value_heads=1,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
        mlp_ratio=6.0,
    ),
    {
        "hidden_states": packed,
        "timestep": fractions,
        "encoder_hidden_states": text,
        "encoder_hidden_states_mask": mask_of_different_lengths,
        "img_shapes": lambda batch, height, width: [(1, height // 2, width // 2)] * batch,
    },
)
FAMILIES |= {
    "CogVideoXTransformer3DModel": Family(
        diffusers.CogVideoXTransformer3DModel,
        config(
            LAYERS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=TEXT_CHANNELS,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=TEXT,
        ),
        {**TEXT_INPUTS, "hidden_states": lambda *size: videos(*size).transpose(1, 2)},
    ),
    "HunyuanVideoTransformer3DModel": Family(
        diffusers.HunyuanVideoTransformer3DModel,
        config(
            HEADS,
            POOLED,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_CHANNELS,
            rope_axes_dim=(4, 4, 8),
        ),
        {
            **TEXT_INPUTS,
            "hidden_states": videos,
            "encoder_attention_mask": mask_of_different_lengths,
            "pooled_projections": pooled,
            "guidance": lambda batch, *_: torch.full((batch,), 3500.0),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        diffusers.HunyuanVideo15Transformer3DModel,
        config(
            LAYERS,
            in_channels=9,
            out_channels=4,
            num_refiner_layers=1,
            text_embed_dim=TEXT_CHANNELS,
            text_embed_2_dim=20,
            image_embed_dim=12,
            rope_axes_dim=(4, 4, 8),
            task_type="t2v",
        ),
        {
            **TEXT_INPUTS,
            "hidden_states": lambda batch, *size: torch.randn(batch, 9, FRAMES, *size),
            "encoder_attention_mask": mask_of_different_lengths,
            "encoder_hidden_states_2": draw(TEXT, 20),
            "encoder_attention_mask_2": mask_of_different_lengths,
            "image_embeds": lambda batch, *_: torch.zeros(batch, 3, 12),
        },
    ),
    "HunyuanImageTransformer2DModel": Family(
        diffusers.HunyuanImageTransformer2DModel,
        config(
            HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_CHANNELS,
            text_embed_2_dim=20,
            rope_axes_dim=(8, 8),
            guidance_embeds=True,
        ),
        {
            **TEXT_INPUTS,
            "encoder_attention_mask": mask_of_different_lengths,
            "encoder_hidden_states_2": draw(TEXT, 20),
            "encoder_attention_mask_2": mask_of_different_lengths,
            "guidance": lambda batch, *_: torch.full((batch,), 3500.0),
        },
    ),
}
# As the config of these models' classes, but for sizes.
WAN = {"in_channels": 4, "out_channels": 4, "text_dim": TEXT_CHANNELS, "freq_dim": 16, "ffn_dim": 32}
VIDEO_INPUTS = {**TEXT_INPUTS, "hidden_states": videos}
LTX = {"cross_attention_dim": 32, "caption_channels": TEXT_CHANNELS, "in_channels": 4, "out_channels": 4}
LTX_SIZE = {
    "num_frames": lambda *_: FRAMES,
    "height": lambda batch, height, width: height,
    "width": lambda batch, height, width: width,
}


def video_tokens(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, FRAMES * height * width, 4)


def places(batch: int, height: int, width: int) -> list[Tensor]:
    return [torch.arange(length) for length in (FRAMES, height // 2, width // 2)]


FAMILIES |= {
    "LTXVideoTransformer3DModel": Family(
        diffusers.LTXVideoTransformer3DModel,
        config(LAYERS, LTX),
        {
            **TEXT_INPUTS,
            "hidden_states": video_tokens,
            "encoder_attention_mask": mask_of_different_lengths,
            **LTX_SIZE,
        },
    ),
    "LTX2VideoTransformer3DModel": Family(
        diffusers.LTX2VideoTransformer3DModel,
        config(
            LAYERS,
            LTX,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
        ),
        {
            **TEXT_INPUTS,
            "hidden_states": video_tokens,
            "audio_hidden_states": draw(6, 4),
            "audio_encoder_hidden_states": text,
            "audio_num_frames": lambda *_: 6,
            **LTX_SIZE,
        },
    ),
    "CosmosTransformer3DModel": Family(
        diffusers.CosmosTransformer3DModel,
        config(
            LAYERS,
            in_channels=4,
            out_channels=4,
            text_embed_dim=TEXT_CHANNELS,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            concat_padding_mask=False,  # it would need torchvision
        ),
        {**VIDEO_INPUTS, "timestep": fractions, "fps": lambda *_: 30},
    ),
    "SkyReelsV2Transformer3DModel": Family(
        diffusers.SkyReelsV2Transformer3DModel,
        config(LAYERS, WAN, rope_max_seq_len=32),
        {**VIDEO_INPUTS, "timestep": whole_timesteps},
    ),
    "WanVACETransformer3DModel": Family(
        diffusers.WanVACETransformer3DModel,
        config(LAYERS, WAN, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=12),
        {
            **VIDEO_INPUTS,
            "timestep": whole_timesteps,
            "control_hidden_states": lambda batch, *size: torch.randn(batch, 12, FRAMES, *size),
        },
    ),
    "MochiTransformer3DModel": Family(
        diffusers.MochiTransformer3DModel,
        config(
            LAYERS,
            in_channels=4,
            out_channels=4,
            pooled_projection_dim=12,
            text_embed_dim=TEXT_CHANNELS,
            time_embed_dim=16,
        ),
        {**VIDEO_INPUTS, "encoder_attention_mask": mask_of_different_lengths},
    ),
    "MotifVideoTransformer3DModel": Family(
        diffusers.MotifVideoTransformer3DModel,
        config(
            HEADS,
            in_channels=9,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=TEXT_CHANNELS,
            rope_axes_dim=(4, 4, 8),
        ),
        {
            **VIDEO_INPUTS,
            "hidden_states": lambda batch, *size: torch.randn(batch, 9, FRAMES, *size),
            "encoder_attention_mask": mask_of_different_lengths,
        },
        blocks=3,
    ),
    "Kandinsky5Transformer3DModel": Family(
        diffusers.Kandinsky5Transformer3DModel,
        config(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=TEXT_CHANNELS,
            in_text_dim2=12,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 8),
        ),
        {
            **TEXT_INPUTS,
            "hidden_states": lambda batch, *size: torch.randn(batch, FRAMES, *size, 4),
            "pooled_projections": pooled,
            "visual_rope_pos": places,
            "text_rope_pos": lambda *_: torch.arange(TEXT),
        },
    ),
    "SanaVideoTransformer3DModel": Family(
        diffusers.SanaVideoTransformer3DModel,
        config(
            LATENTS,
            LAYERS,
            CAPTIONS,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            rope_max_seq_len=32,
        ),
        {**VIDEO_INPUTS, "encoder_attention_mask": mask_of_different_lengths},
    ),
}
# As Qwen-Image-Edit-2511.
_QWEN = FAMILIES["QwenImageTransformer2DModel"]
FAMILIES["QwenImageTransformer2DModel of edits"] = replace(_QWEN, config={**_QWEN.config, "zero_cond_t": True})
# As Qwen-Image-Layered: the whole picture and two layers are made, of a picture that comes behind them.
FAMILIES["QwenImageTransformer2DModel of layers"] = replace(
    _QWEN,
    config={**_QWEN.config, "use_layer3d_rope": True, "use_additional_t_cond": True},
    draws={
        **_QWEN.draws,
        "hidden_states": lambda batch, height, width: torch.cat(
            [*(packed(batch, height, width) for _ in range(3)), torch.ones(batch, height // 2 * (width // 2), 16)],
            dim=1,
        ),
        "img_shapes": lambda batch, height, width: [[(1, height // 2, width // 2)] * 4] * batch,
        "additional_t_cond": lambda batch, *_: torch.zeros(batch, dtype=torch.long),
    },
)
