"""Patched over plain forward for every family, at the width of the real models, with few layers.

    python benchmarks/family_forward.py [--families SD-1.5 ...] [--within 0.02] [--most 200] [--device cpu]

A and B alternate in one process; each figure is the median of the rounds' ratios, with its 95 % interval by the order
of the ratios. Rounds go on until that is within ±0.02, or there were too many. Two patches a family: one prompt per
token, and a grid of at most 8×8 (of 16×16 tokens or more).
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
            sample_size=64,
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
        (1, 4, 64, 64),
        text(2048, 1280, name="text_embeds"),
    ),
    "PixArt-Sigma, 4 blocks": Case(
        lambda: diffusers.PixArtTransformer2DModel(
            sample_size=64, num_layers=4, caption_channels=4096, use_additional_conditions=False
        ),
        (1, 4, 64, 64),
        text(4096),
    ),
    "SD3-medium, 4 blocks": Case(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=64, num_layers=4, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        ),
        (1, 16, 64, 64),
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
        (1, 16, 3, 32, 32),
        text(4096),
        [3, 32, 32],
        (2, 8, 8),
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
