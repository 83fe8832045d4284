"""Patched over plain forward for every family, at the width of the real models, with few layers.

    python benchmarks/family_forward.py [--families SD-1.5 ...] [--within 0.02] [--most 200] [--device cpu]

A and B alternate in one process; each figure is the median of the rounds' ratios, with its 95 % interval by the order
of the ratios. Rounds go on until that is within ±0.02, or there were too many. Two patches a family: one prompt per
token, and a grid of at most 8×8 (of 16×16 tokens; of films 2×4×4, of 3×8×8).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from stagepatch import Patch, PatchConfig
from stagepatch.families import predict

_LEAST = 15  # rounds


@dataclass
class Case:
    """A model, its latents [B, C, ...] and its condition; `size` where the model does not know its own."""

    build: Callable[[], nn.Module]
    latents: tuple[int, ...]
    condition: Callable[[], dict[str, Tensor]] = dict
    size: list[int] | None = None
    grid: tuple[int, ...] = (8, 8)


def text(
    width: int, pooled: int = 0, tokens: int = 77, name: str = "pooled_projections"
) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        condition = {"encoder_hidden_states": torch.randn(1, tokens, width)}
        return condition | ({name: torch.randn(1, pooled)} if pooled else {})

    return make


def masked(width: int, name: str = "encoder_attention_mask") -> Callable[[], dict[str, Any]]:
    return lambda: {"encoder_hidden_states": torch.randn(1, 77, width), name: torch.ones(1, 77, dtype=torch.bool)}


def given(**shapes: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    """Of one sample; masks leave nothing out."""

    def make() -> dict[str, Any]:
        masks = {name: torch.ones(1, *shape, dtype=torch.bool) for name, shape in shapes.items() if "mask" in name}
        return {name: torch.randn(1, *shape) for name, shape in shapes.items()} | masks

    return make


FILM, FILM_GRID = [3, 16, 16], (2, 4, 4)
# Text, or an image's embedding, is among the keys of self-attention.
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}

CASES = {
    "DiT-XL/2 of diffusers, 4 blocks": Case(
        lambda: diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=4),
        (1, 4, 32, 32),
        lambda: {"class_labels": torch.tensor([3])},
    ),
    "DDPM of CIFAR-10": Case(
        lambda: diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            norm_num_groups=32,
        ),
        (8, 3, 32, 32),
    ),
    "SD-1.5": Case(
        lambda: diffusers.UNet2DConditionModel(sample_size=32, cross_attention_dim=768, attention_head_dim=8),
        (1, 4, 32, 32),
        text(768),
    ),
    "SDXL, transformers cut to 1, 1 and 2 layers": Case(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        (1, 4, 32, 32),
        text(2048, 1280, name="text_embeds"),
    ),
    "PixArt-Sigma, 4 blocks": Case(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=32, num_layers=4, caption_channels=4096, use_additional_conditions=False
        ),
        (1, 4, 32, 32),
        text(4096),
    ),
    "SD3-medium, 4 blocks": Case(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=32, num_layers=4, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        ),
        (1, 16, 32, 32),
        text(4096, 2048),
    ),
    "FLUX.1, 1 double and 1 single block": Case(
        lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1),
        (1, 16, 32, 32),
        text(4096, 768),
        [32, 32],
    ),
    "Sana-0.6B, 4 blocks": Case(
        lambda: diffusers.SanaTransformer2DModel(
            num_attention_heads=36,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
            num_layers=4,
            sample_size=32,
        ),
        (1, 32, 32, 32),
        text(2304),
    ),
    "Lumina-Image 2.0, 4 blocks": Case(
        lambda: diffusers.Lumina2Transformer2DModel(sample_size=32, num_layers=4, cap_feat_dim=2304),
        (1, 16, 32, 32),
        masked(2304),
    ),
    "AuraFlow, 1 joint and 1 single block": Case(
        lambda: diffusers.AuraFlowTransformer2DModel(sample_size=32, num_mmdit_layers=1, num_single_dit_layers=1),
        (1, 4, 32, 32),
        text(2048),
    ),
    "Qwen-Image, 1 block": Case(
        lambda: diffusers.QwenImageTransformer2DModel(num_layers=1),
        (1, 16, 32, 32),
        masked(3584, "encoder_hidden_states_mask"),
        [32, 32],
    ),
    "Wan2.1-1.3B, 4 blocks": Case(
        lambda: diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=4),
        (1, 16, 3, 16, 16),
        text(4096),
        FILM,
        FILM_GRID,
    ),
    "FLUX.2 klein-4B, 1 double and 2 single blocks": Case(
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=1, num_single_layers=2, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        (1, 32, 32, 32),
        text(7680),
        [32, 32],
    ),
    "FLUX.2 klein-4B with a picture to edit": Case(
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=1, num_single_layers=2, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        (1, 32, 32, 32),
        given(encoder_hidden_states=(77, 7680), reference_latents=(1, 32, 32, 32)),
        [32, 32],
    ),
    "Chroma, 1 double and 1 single block": Case(
        lambda: diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1),
        (1, 16, 32, 32),
        given(encoder_hidden_states=(77, 4096), attention_mask=(77,)),
        [32, 32],
    ),
    "HiDream, 1 double and 1 single block": Case(
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[4096, 4096],
            axes_dims_rope=(64, 32, 32),
            llama_layers=[0, 1],
        ),
        (1, 16, 32, 32),
        given(encoder_hidden_states_t5=(77, 4096), encoder_hidden_states_llama3=(2, 77, 4096), pooled_embeds=(2048,)),
        [32, 32],
    ),
    "Ovis-Image, 1 double and 2 single blocks": Case(
        lambda: diffusers.OvisImageTransformer2DModel(num_layers=1, num_single_layers=2),
        (1, 16, 32, 32),
        text(2048),
        [32, 32],
    ),
    "LongCat-Image, 1 double and 1 single block": Case(
        lambda: diffusers.LongCatImageTransformer2DModel(num_layers=1, num_single_layers=1),
        (1, 16, 32, 32),
        text(3584),
        [32, 32],
    ),
    "Bria 3, 1 double and 1 single block": Case(
        lambda: diffusers.BriaTransformer2DModel(num_layers=1, num_single_layers=1),
        (1, 16, 32, 32),
        text(4096),
        [32, 32],
    ),
    "Bria FIBO, 1 double and 1 single block": Case(
        lambda: diffusers.BriaFiboTransformer2DModel(in_channels=48, num_layers=1, num_single_layers=1),
        (1, 48, 16, 16),
        given(encoder_hidden_states=(77, 4096), text_encoder_layers=(77, 2, 2048), mask=(77,)),
        [16, 16],
    ),
    "OmniGen, 2 blocks": Case(
        lambda: diffusers.OmniGenTransformer2DModel(
            num_layers=2, rope_scaling={"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
        ),
        (1, 4, 32, 32),
        lambda: {"input_ids": torch.arange(1, 78)[None], "encoder_attention_mask": torch.ones(1, 77).bool()},
        [32, 32],
    ),
    "Z-Image, 1 refining and 2 joint blocks": Case(
        lambda: diffusers.ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1),
        (1, 16, 32, 32),
        masked(2560),
        [32, 32],
    ),
    "Krea 2, 1 block": Case(
        lambda: diffusers.Krea2Transformer2DModel(num_layers=1),
        (1, 16, 32, 32),
        given(encoder_hidden_states=(77, 12, 2560), encoder_attention_mask=(77,)),
        [32, 32],
    ),
    "ERNIE-Image, 2 blocks": Case(
        lambda: diffusers.ErnieImageTransformer2DModel(num_layers=2), (1, 32, 32, 32), masked(2560), [32, 32]
    ),
    "Ideogram 4, 1 block": Case(
        lambda: diffusers.Ideogram4Transformer2DModel(num_layers=1), (1, 32, 32, 32), masked(53248), [32, 32]
    ),
    "CogView4, 2 blocks": Case(
        lambda: diffusers.CogView4Transformer2DModel(num_layers=2, sample_size=32, rope_axes_dim=(256, 256)),
        (1, 16, 32, 32),
        masked(4096),
    ),
    "CogView3-Plus, 2 blocks": Case(
        lambda: diffusers.CogView3PlusTransformer2DModel(num_layers=2, sample_size=32), (1, 16, 32, 32), text(4096)
    ),
    "PRX, 4 blocks": Case(
        lambda: diffusers.PRXTransformer2DModel(depth=4, axes_dim=[32, 32]),
        (1, 16, 32, 32),
        given(encoder_hidden_states=(77, 2304), attention_mask=(77,)),
        [32, 32],
    ),
    "ADM of ImageNet 64": Case(
        lambda: diffusers.UNet2DModel(
            sample_size=32,
            out_channels=6,
            block_out_channels=(192, 384, 576, 768),
            down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            attention_head_dim=64,
            num_class_embeds=1000,
            resnet_time_scale_shift="scale_shift",
        ),
        (1, 3, 32, 32),
        lambda: {"class_labels": torch.tensor([3])},
    ),
    "Kandinsky 2.2": Case(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=32,
            out_channels=8,
            block_out_channels=(384, 768, 1152, 1536),
            layers_per_block=3,
            cross_attention_dim=768,
            attention_head_dim=64,
            addition_embed_type="image",
            encoder_hid_dim=1280,
            encoder_hid_dim_type="image_proj",
            **SIMPLE,
        ),
        (1, 4, 32, 32),
        given(image_embeds=(1280,)),
    ),
    "DeepFloyd IF-M": Case(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=32,
            in_channels=3,
            out_channels=6,
            block_out_channels=(192, 384, 576, 768),
            layers_per_block=3,
            cross_attention_dim=768,
            attention_head_dim=64,
            addition_embed_type="text",
            addition_embed_type_num_heads=64,
            encoder_hid_dim=4096,
            encoder_hid_dim_type="text_proj",
            **SIMPLE,
        ),
        (1, 3, 32, 32),
        text(4096),
    ),
    "Qwen-Image 2.1, 2 blocks": Case(
        lambda: diffusers.QwenImage21Transformer2DModel(num_layers=2),
        (1, 64, 16, 16),
        masked(4096, "encoder_hidden_states_mask"),
        [16, 16],
    ),
    "Qwen-Image-Edit-2511, 1 block, with a picture": Case(
        lambda: diffusers.QwenImageTransformer2DModel(num_layers=1, zero_cond_t=True),
        (1, 16, 32, 32),
        given(encoder_hidden_states=(77, 3584), encoder_hidden_states_mask=(77,), reference_latents=(1, 16, 32, 32)),
        [32, 32],
    ),
    "CogVideoX-5B, 1 block": Case(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=1, use_rotary_positional_embeddings=True
        ),
        (1, 16, 3, 16, 16),
        text(4096, tokens=226),
        FILM,
        FILM_GRID,
    ),
    "HunyuanVideo, 1 double and 1 single block": Case(
        lambda: diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1),
        (1, 16, 3, 16, 16),
        given(encoder_hidden_states=(77, 4096), encoder_attention_mask=(77,), pooled_projections=(768,)),
        FILM,
        FILM_GRID,
    ),
    "HunyuanVideo 1.5, 2 blocks": Case(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(num_layers=2, task_type="t2v"),
        (1, 32, 3, 8, 8),
        given(
            encoder_hidden_states=(77, 3584),
            encoder_attention_mask=(77,),
            encoder_hidden_states_2=(77, 1472),
            encoder_attention_mask_2=(77,),
        ),
        [3, 8, 8],
        FILM_GRID,
    ),
    "HunyuanImage 2.1, 1 double and 1 single block": Case(
        lambda: diffusers.HunyuanImageTransformer2DModel(num_layers=1, num_single_layers=1, text_embed_2_dim=1472),
        (1, 64, 16, 16),
        given(
            encoder_hidden_states=(77, 3584),
            encoder_attention_mask=(77,),
            encoder_hidden_states_2=(77, 1472),
            encoder_attention_mask_2=(77,),
        ),
        [16, 16],
    ),
    "LTX-Video, 4 blocks": Case(
        lambda: diffusers.LTXVideoTransformer3DModel(num_layers=4),
        (1, 128, 3, 8, 8),
        masked(4096),
        [3, 8, 8],
        FILM_GRID,
    ),
    "Cosmos-Predict2, 2 blocks": Case(
        lambda: diffusers.CosmosTransformer3DModel(
            num_attention_heads=16, num_layers=2, concat_padding_mask=False, extra_pos_embed_type=None
        ),
        (1, 16, 3, 16, 16),
        text(1024),
        FILM,
        FILM_GRID,
    ),
    "SkyReels-V2-1.3B, 4 blocks": Case(
        lambda: diffusers.SkyReelsV2Transformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=4),
        (1, 16, 3, 16, 16),
        text(4096),
        FILM,
        FILM_GRID,
    ),
    "Wan VACE-1.3B, 2 blocks": Case(
        lambda: diffusers.WanVACETransformer3DModel(
            num_attention_heads=12, ffn_dim=8960, num_layers=2, vace_layers=[0]
        ),
        (1, 16, 3, 16, 16),
        given(encoder_hidden_states=(77, 4096), reference_latents=(1, 16, 3, 16, 16)),
        FILM,
        FILM_GRID,
    ),
    "Mochi, 1 block": Case(
        lambda: diffusers.MochiTransformer3DModel(num_layers=1), (1, 12, 3, 16, 16), masked(4096), FILM, FILM_GRID
    ),
    "Kandinsky 5 lite, 4 blocks": Case(
        lambda: diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=16,
            out_visual_dim=16,
            model_dim=1792,
            ff_dim=7168,
            num_visual_blocks=4,
            axes_dims=(16, 24, 24),
        ),
        (1, 16, 3, 16, 16),
        lambda: {
            **given(encoder_hidden_states=(77, 3584), encoder_attention_mask=(77,), pooled_projections=(768,))(),
            "of_pictures": torch.zeros(1, 1, dtype=torch.bool),
        },
        FILM,
        FILM_GRID,
    ),
    "LTX-2, 1 block": Case(
        lambda: diffusers.LTX2VideoTransformer3DModel(num_layers=1),
        (1, 128, 3, 8, 8),
        masked(3840),
        [3, 8, 8],
        FILM_GRID,
    ),
    "Motif-Video, 1 double and 1 single block": Case(
        lambda: diffusers.MotifVideoTransformer3DModel(num_layers=1, num_single_layers=1),
        (1, 16, 3, 16, 16),
        masked(4096),
        FILM,
        FILM_GRID,
    ),
    "Nucleus-Image, 2 dense blocks": Case(
        lambda: diffusers.NucleusMoEImageTransformer2DModel(num_layers=2),
        (1, 16, 32, 32),
        given(encoder_hidden_states=(77, 3584), encoder_hidden_states_mask=(77,)),
        [32, 32],
    ),
    "GLM-Image, 2 blocks": Case(
        lambda: diffusers.GlmImageTransformer2DModel(num_layers=2),
        (1, 16, 32, 32),
        lambda: {
            **given(encoder_hidden_states=(16, 1472), encoder_attention_mask=(16,))(),
            "prior_token_id": torch.zeros(1, 256, dtype=torch.long),
            "is_dropped": torch.zeros(1, 1, dtype=torch.bool),
            "is_exponential": torch.ones(1, 1, dtype=torch.bool),
        },
        [32, 32],
    ),
    "Sana-Video, 4 blocks": Case(
        lambda: diffusers.SanaVideoTransformer3DModel(num_layers=4), (1, 16, 3, 16, 16), masked(2304), FILM, FILM_GRID
    ),
}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def ratio(model: nn.Module, patch: Patch, inputs: tuple[Any, ...], within: float, most: int) -> str:
    """Median over rounds of patched over plain, the two a moment apart and in turns the first; with its interval."""
    for prompts in patch.prompts:
        prompts.normal_()

    def plain() -> float:
        return seconds(lambda: predict(model, *inputs))

    def patched() -> float:
        with patch.attach(model):
            return seconds(lambda: predict(model, *inputs))

    plain()
    ratios: list[float] = []
    low, high = 0.0, math.inf
    while len(ratios) < _LEAST or (high - low > 2.0 * within and len(ratios) < most):
        if len(ratios) % 2:
            after, before = patched(), plain()
        else:
            before, after = plain(), patched()
        ratios.append(after / before)
        first = max(0, math.floor(len(ratios) / 2.0 - 0.98 * math.sqrt(len(ratios))))
        low, high = sorted(ratios)[first], sorted(ratios)[-1 - first]
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}, {len(ratios)} rounds)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=list(CASES))
    parser.add_argument("--within", type=float, default=0.02)
    parser.add_argument("--most", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {arguments.device}")
    print(f"{'':<46} {'per token':>36} {'small grid':>36}")
    for name in arguments.families:
        case = CASES[name]
        torch.manual_seed(0)
        model = case.build().eval().requires_grad_(False).to(arguments.device)
        condition = {key: value.to(arguments.device) for key, value in case.condition().items()}
        inputs = torch.randn(case.latents).to(arguments.device), torch.tensor([500]).to(arguments.device), condition
        inputs = inputs[0], inputs[1].expand(case.latents[0]), condition
        ratios = []
        for grid in (None, list(case.grid)):
            patch = Patch.create(model, PatchConfig(sample_size=case.size, grid=grid))
            ratios.append(ratio(model, patch, inputs, arguments.within, arguments.most))
        print(f"{name:<46} {ratios[0]:>36} {ratios[1]:>36}", flush=True)
        del model


if __name__ == "__main__":
    main()
