"""Train a DiT or a U-Net from scratch."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from stagepatch.checkpoints import (
    add_routing,
    lay_out_encoders,
    projection_width,
    save_config,
    save_denoiser,
    token_width,
)
from stagepatch.cli import config as configs
from stagepatch.cli.common import say
from stagepatch.core import GLOBAL, UserError, as_user_error, processes, seed_for
from stagepatch.diffusion import make_scheduler
from stagepatch.methods import Finetune
from stagepatch.models import DIT_SIZES, DiT, ModelConfig
from stagepatch.patch import with_condition
from stagepatch.training import Run, TrainConfig, write_run_config

_OF_UNETS = ("block_out_channels", "layers_per_block", "attention_stages", "unet_options")
_OF_ROUTING = ("routed_share", "routing_shift")


def pretrain(config: configs.PretrainConfig, resolved: str) -> None:
    """Train a model from scratch and save it as a model directory, with its VAE and text encoder if it has some."""
    torch.manual_seed(seed_for(GLOBAL, config.training.seed))
    options = {}
    if config.parts and config.model.conditioning == "text":
        is_unet = bool(config.model.block_out_channels)
        width = {"cross_attention_dim": token_width} if is_unet else {"pooled_projection_dim": projection_width}
        options = {name: read(config.parts) for name, read in width.items()}
    model: Any = _make_model(config.model, config.training.label_dropout, **options)
    if config.model.routed_share != 1.0:
        shift, num_train_timesteps = config.model.routing_shift, config.objective.num_train_timesteps
        add_routing(model, config.model.routed_share, shift, num_train_timesteps)
    scheduler = make_scheduler(config.objective, config.model.learn_sigma)
    identity: dict[str, Any] = {"model": config.model, "objective": config.objective, "data": config.data}
    if config.balancing.name != "none":
        identity["balancing"] = config.balancing
    parts = ""
    if config.parts:
        identity["parts"] = config.parts
        parts = config.output_dir
        if processes().is_main_process:
            lay_out_encoders(config.parts, Path(parts), config.model.conditioning == "text")
            save_config(model, Path(parts))  # what tells how captions are encoded
        processes().wait_for_everyone()
    if config.training.steps == 0:
        _keep_as_drawn(config, model, scheduler, resolved)
        return
    job = TrainConfig(
        output_dir=config.output_dir,
        model=config.output_dir,
        cache=config.cache,
        method=config.method,
        patch=config.patch,
        balancing=config.balancing,
        data=config.data,
        training=config.training,
    )
    if config.method == "joint":
        identity |= {"method": "joint", "patch": with_condition(config.patch, model)}
    run = Run(job, model, scheduler, identity, resolved, parts)
    if config.data.crop == "center":
        _check_size(run.dataset[0]["image"].shape, model, run.config.data.image_size)
    assert isinstance(run.method, Finetune)
    run.method.scheduler = scheduler  # so that it saves a model
    run.train()
    say(f"The model is in '{config.output_dir}'.")


def _keep_as_drawn(config: configs.PretrainConfig, model: Any, scheduler: Any, resolved: str) -> None:
    """A model that nothing was learned by: where rows from scratch start from."""
    if config.method == "joint":
        raise UserError("method='joint' with training.steps=0 trains no patch: give steps, or leave out the method.")
    if processes().is_main_process:
        save_denoiser(model, scheduler, config.output_dir)
        write_run_config(config.output_dir, resolved)
    processes().wait_for_everyone()
    say(f"The model, as it was drawn, is in '{config.output_dir}'.")


def _check_size(shape: Sequence[int], model: Any, image_size: int) -> None:
    """Refuse a sample size that no image of the data has."""
    expected = (model.config["in_channels"], model.config["sample_size"], model.config["sample_size"])
    if tuple(shape) != expected:
        raise UserError(
            f"data.image_size={image_size} gives samples of {list(shape)}, but the model is of {list(expected)}: set "
            f"model.in_channels={shape[0]} and model.sample_size={shape[-1]}, or another image size."
        )


def _make_model(config: ModelConfig, label_dropout: float, **more: int) -> nn.Module:
    if config.block_out_channels:
        return _make_unet(config, **more)
    if config.unet_options:
        raise UserError(f"unet_options={config.unet_options} are a U-Net's: give block_out_channels, which makes one.")
    options = {
        key: value for key, value in asdict(config).items() if key not in (*_OF_UNETS, *_OF_ROUTING, "name")
    } | more
    if not config.name:
        return DiT(class_dropout_prob=label_dropout, **options)  # type: ignore[no-any-return]
    options = {key: value for key, value in options.items() if key not in DIT_SIZES["DiT-S/2"]}
    # A named size sets the others itself.
    return DiT.from_name(config.name, class_dropout_prob=label_dropout, **options)  # type: ignore[no-any-return]


def _make_unet(config: ModelConfig, **more: int) -> nn.Module:
    stages, channels = len(config.block_out_channels), config.block_out_channels
    if config.name or config.convolved_heads:
        raise UserError(
            f"name='{config.name}' and convolved_heads={config.convolved_heads} are a DiT's: with block_out_channels, "
            f"which makes a U-Net, leave them out."
        )
    if config.conditioning == "text" and not more:
        raise UserError("A U-Net of text attends to the tokens of a text encoder: give --parts, which has one.")
    if config.sample_size % 2 ** (stages - 1):
        raise UserError(f"sample_size={config.sample_size} cannot be halved {stages - 1} times, once between stages.")
    attention = "CrossAttn" if config.conditioning == "text" else "Attn"
    kinds = [attention if stage in config.attention_stages else "" for stage in range(stages)]
    options: dict[str, Any] = {
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "block_out_channels": tuple(channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": math.gcd(32, *channels),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    }
    if config.conditioning == "class":
        options["num_class_embeds"] = config.num_classes
    unet = UNet2DConditionModel if config.conditioning == "text" else UNet2DModel
    with as_user_error(f"model.unet_options={config.unet_options} make no {unet.__name__}", TypeError, ValueError):
        model: nn.Module = unet(**options | more | config.unet_options)
    return model
