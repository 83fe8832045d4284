"""How a denoiser is called, and what its config says of its condition and its output."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.diffusion import TimestepsConfig
from stagepatch.families.base import square
from stagepatch.families.registry import VideoCall, family_of, uncompiled


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in, and takes its inputs in: diffusers' `model.dtype`.

    The first parameter's may be another: quantised weights are integers, and some modules stay in float32.
    """
    model = uncompiled(model)
    own = getattr(model, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)


def num_classes(model: Any) -> int:
    """Classes that the model takes labels of; 0 where it takes none."""
    config = model.config
    if "conditioning" in config:
        return int(config["num_classes"]) if config["conditioning"] == "class" else 0
    if _is_diffusers_dit(config):
        return int(config["num_embeds_ada_norm"])
    return int(config.get("num_class_embeds") or 0)


def null_label(model: Any) -> int | None:
    """The label that stands for no label; None where the model has none, as diffusers' U-Nets."""
    has_null = "conditioning" in model.config or _is_diffusers_dit(model.config)
    return num_classes(model) if has_null and num_classes(model) else None


def takes_text(model: Any) -> bool:
    """Whether the model's condition is text."""
    family = family_of(type(uncompiled(model)))
    if family.encode_captions is None or takes_image_embeds(model):
        return False
    return bool(model.config.get("conditioning", "text") == "text")


def takes_videos(model: Any) -> bool:
    """Whether training can give the model several frames at once."""
    return isinstance(family_of(type(uncompiled(model))).call, VideoCall)


def takes_image_embeds(model: Any) -> bool:
    """Whether a U-Net's condition is an image's embedding, which a prior makes of text (Kandinsky 2.2)."""
    return bool(model.config.get("encoder_hid_dim_type") == "image_proj")


# What configs call the width of the text's tokens; cross-attention's is that of projected ones, where there are two.
_TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "joint_attention_dim",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "text_embed_dim",
    "in_text_dim",
    "cross_attention_dim",
)


def text_channels(model: Any) -> int:
    """Width of the text's tokens, `encoder_hidden_states`, as the model takes them; 0 where it takes none."""
    arguments = inspect.signature(type(uncompiled(model)).forward).parameters
    if "encoder_hidden_states" not in arguments or takes_image_embeds(model):
        return 0
    own = model.config.get("use_prompt_embeddings", True)  # in LTX-2.3 and later captions come projected
    widths = (model.config.get(name) for name in (_TEXT_WIDTHS if own else ("cross_attention_dim",)))
    return next((width for width in widths if isinstance(width, int)), 0)


def pooled_text(arguments: Mapping[str, Any]) -> Tensor:
    """The mean of a forward's text tokens that are not masked, [B, C], of its arguments by name.

    The `attention_mask` of Chroma, and that of Bria FIBO, [B, 1, 1, N], go on over the image.
    """
    tokens: Tensor = arguments["encoder_hidden_states"]
    names = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
    given = {**(arguments.get("joint_attention_kwargs") or {}), **arguments}
    masks = (given.get(name) for name in names)
    mask = next((mask for mask in masks if mask is not None), tokens.new_ones(tokens.shape[:2]))
    mask = mask.flatten(1)[:, : tokens.shape[1]].unsqueeze(-1).to(tokens.dtype)
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0)


def learns_sigma(model: Any) -> bool:
    """Whether the second half of the output's channels is the variance's interpolation."""
    config = model.config
    return bool(config.get("learn_sigma", config.get("out_channels") == 2 * config.get("in_channels", 0)))


def with_density(config: TimestepsConfig, model: Any) -> TimestepsConfig:
    """A config in which the density 'published' is the one of the model's family: logit-normal, or else uniform."""
    if config.density != "published":
        return config
    shape = family_of(type(uncompiled(model))).logit_normal
    if shape is None:
        return replace(config, density="uniform")
    return replace(config, density="logit_normal", logit_mean=shape[0], logit_std=shape[1])


def sample_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the model's own sample size; of a video model, those of a picture.

    Raises:
        UserError: neither the model's config nor its family has a sample size.
    """
    family = family_of(type(uncompiled(model)))
    size = model.config.get("sample_size") or family.sample_size
    if not size:
        raise UserError(
            f"The config of this {family.model_class} has no sample_size, nor has its family: give "
            f"sample_size=(height, width) to stagepatch.families.register."
        )
    height, width = square(size)
    return model.config[family.channels] // (4 if family.is_packed else 1), height, width


def predict(model: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor | dict[str, Tensor]) -> Tensor:
    """The model's output [B, C or 2C, H, W] for a sample [B, C, H, W] at timesteps [B] of 0 to 1000.

    Of a model of videos both may be [B, C, F, H, W].

    Args:
        condition: class labels [B], which an unconditional model is not told, or tensors by keyword, a row a sample.
    """
    if isinstance(condition, torch.Tensor):
        condition = {"class_labels": condition} if num_classes(model) else {}
    family = family_of(type(uncompiled(model)))
    return family.call(model, sample, family.own_timesteps(timesteps), condition)


def _is_diffusers_dit(config: dict[str, Any]) -> bool:
    return config.get("norm_type") == "ada_norm_zero" and "num_embeds_ada_norm" in config
