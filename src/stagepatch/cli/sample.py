"""Generate images."""

from pathlib import Path
from typing import Any

import torch

from stagepatch.checkpoints import is_pipeline, load_pipeline
from stagepatch.cli import config as configs
from stagepatch.cli.common import RUN_CONFIG, bar_over, load_on_device, own_share, put_on
from stagepatch.core import UserError, processes, read_yaml, write_tensors, write_text
from stagepatch.diffusion import make_sampler, pin_timesteps
from stagepatch.families import find_denoiser
from stagepatch.report import image_grid, write_picture
from stagepatch.sampling import (
    SamplingConfig,
    attach_guide,
    balanced_labels,
    generate,
    generate_with_pipeline,
    load_experts,
    load_limited_loras,
    prompted_latents,
)


def sample(config: configs.SampleConfig, resolved: str) -> None:
    """Generate images, and write them as tensors and as a grid."""
    if config.patch and config.schedule:
        raise UserError("Give --patch or --schedule: a schedule can name patches itself.")
    directory = Path(config.output_dir)
    dtype = getattr(torch, config.dtype)
    if is_pipeline(config.model):
        model, scheduler = load_pipeline(config.model, config.memory, torch_dtype=dtype).to(processes().device), None
    else:
        model, scheduler = load_on_device(config.model, dtype, config.memory)
    attach_guide(model, scheduler or model.scheduler, config.sampling)
    sampling = _put_experts_on(config, model, scheduler) if config.schedule else config.sampling
    if config.patch:
        put_on(config.patch, config.patch_scale, model, config.component)
    with bar_over(own_share(sampling.num_images)) as on_batch:
        if scheduler is None:
            images = generate_with_pipeline(model, sampling, config.prompts, on_batch, config.classes, config.call)
        else:
            labels = balanced_labels(model, sampling.num_images, config.classes)
            latents = prompted_latents(config.model, model, config.prompts, dtype)
            further = {} if latents is None else vars(latents)
            images = generate(model, scheduler, sampling, labels, on_batch=on_batch, **further)
    if not processes().is_main_process:
        return
    write_text(directory / RUN_CONFIG, resolved)
    write_tensors(directory / "samples.safetensors", {"images": images})
    write_picture(directory / "grid.png", image_grid(images[:100], columns=10))
    print(f"{len(images)} images are in '{directory / 'samples.safetensors'}', a grid in '{directory / 'grid.png'}'.")


def _put_experts_on(config: configs.SampleConfig, model: Any, scheduler: Any) -> SamplingConfig:
    """The model schedule's experts, or LoRAs, on a denoiser or on a pipeline's; returns how it is to be sampled."""
    content = read_yaml(Path(config.schedule), "schedule")
    if isinstance(content, dict) and "loras" in content:
        load_limited_loras(config.schedule, model, config.component)
        return config.sampling
    experts = load_experts(config.schedule, find_denoiser(model), scheduler or model.scheduler)
    experts.attach(model)
    if scheduler is None and experts.timesteps is not None:
        if experts.scheduler:
            model.scheduler = make_sampler(experts.scheduler, model.scheduler)
        pin_timesteps(model.scheduler, experts.timesteps)
    return experts.sampling(config.sampling)
