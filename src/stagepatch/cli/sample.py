"""Generate images."""

from pathlib import Path
from typing import Any

import torch

from stagepatch.checkpoints import is_pipeline, load_pipeline
from stagepatch.cli import config as configs
from stagepatch.cli.common import (
    bar_over,
    check_scale,
    load_on_device,
    own_share,
    put_experts_on,
    put_on,
    write_run_config,
)
from stagepatch.core import alone_in, processes, write_tensors
from stagepatch.report import image_grid, write_picture
from stagepatch.sampling import (
    SamplingConfig,
    attach_guide,
    balanced_labels,
    generate,
    generate_with_pipeline,
    prompted_latents,
)


def sample(config: configs.SampleConfig, resolved: str) -> None:
    """Generate images, and write them as tensors and as a grid."""
    check_scale(config)
    directory = Path(config.output_dir)
    dtype = getattr(torch, config.dtype)
    if is_pipeline(config.model):
        model, scheduler = load_pipeline(config.model, config.memory, torch_dtype=dtype).to(processes().device), None
    else:
        model, scheduler = load_on_device(config.model, dtype, config.memory)
    attach_guide(model, scheduler or model.scheduler, config.sampling)
    sampling = config.sampling
    if config.schedule:
        sampling = put_experts_on(config.schedule, model, scheduler, sampling, config.component, config.patch)
    elif config.patch:
        put_on(config.patch, config.patch_scale, model, config.component)
    with alone_in(directory):
        _sample(config, resolved, model, scheduler, sampling)


def _sample(config: configs.SampleConfig, resolved: str, model: Any, scheduler: Any, sampling: SamplingConfig) -> None:
    directory = Path(config.output_dir)
    with bar_over(own_share(sampling.num_images)) as on_batch:
        if scheduler is None:
            images = generate_with_pipeline(model, sampling, config.prompts, on_batch, config.classes, config.call)
        else:
            labels = balanced_labels(model, sampling.num_images, config.classes)
            latents = prompted_latents(config.model, model, config.prompts, getattr(torch, config.dtype))
            further = {} if latents is None else vars(latents)
            images = generate(model, scheduler, sampling, labels, on_batch=on_batch, **further)
    if not processes().is_main_process:
        return
    write_run_config(directory, resolved)
    write_tensors(directory / "samples.safetensors", {"images": images})
    write_picture(directory / "grid.png", image_grid(images[:100], columns=10))
    print(f"{len(images)} images are in '{directory / 'samples.safetensors'}', a grid in '{directory / 'grid.png'}'.")
