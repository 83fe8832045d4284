"""Generation with a whole pipeline of diffusers: captions or classes in, images out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stagepatch.core.errors import UserError
from stagepatch.core.processes import processes
from stagepatch.sampling.config import SamplingConfig
from stagepatch.sampling.generate import image_generator, own_indices, shared


@torch.no_grad()
def generate_with_pipeline(
    pipe: Any,
    config: SamplingConfig,
    prompts: list[str],
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] on the CPU, with the pipeline's own scheduler, at its own size.

    Image i has prompt i modulo their number, or class i modulo theirs, and noise of (seed, i) alone.

    Args:
        config: its scheduler and guidance_channels do not apply here.
        on_batch: called with the number of images done after each batch.

    Raises:
        UserError: a pipeline of captions without prompts.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in takes and not prompts:
        raise UserError(f"{type(pipe).__name__} makes images of captions: give --prompts '[\"a caption\", …]'.")
    pipe.set_progress_bar_config(disable=True)
    own = own_indices(config.num_images)
    batches = []
    for first in range(0, len(own), config.batch_size):
        indices = own[first : first + config.batch_size]
        given: dict[str, Any] = {"generator": [image_generator(config.seed, index) for index in indices]}
        if "prompt" in takes:
            given["prompt"] = [prompts[index % len(prompts)] for index in indices]
        elif "class_labels" in takes:
            classes = pipe.transformer.config.num_embeds_ada_norm
            given["class_labels"] = [index % classes for index in indices]
        if "guidance_scale" in takes:
            given["guidance_scale"] = config.guidance_scale
        made = pipe(**given, num_inference_steps=config.num_inference_steps, output_type="pt", return_dict=False)[0]
        batches.append(made.float().cpu() * 2.0 - 1.0)
        if on_batch is not None:
            on_batch(len(indices))
    if not batches:
        raise UserError(f"num_images={config.num_images} are too few for {processes().num_processes} processes.")
    return shared(torch.cat(batches))
