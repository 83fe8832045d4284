"""Batched generation with any diffusers scheduler."""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Generator, Tensor, nn

from stagepatch.core import UserError, generator_for, processes
from stagepatch.diffusion import check_tells_timesteps, is_edm, is_flow, make_sampler, pin_timesteps, set_steps
from stagepatch.families import (
    find_denoiser,
    input_dtype,
    learns_sigma,
    null_label,
    num_classes,
    predict,
    sample_shape,
)
from stagepatch.sampling.config import SamplingConfig, check_interval
from stagepatch.sampling.experts import experts_on
from stagepatch.sampling.guide import guide_on

_LOGGER = logging.getLogger("stagepatch")
# a condition of each sample, and that of none; tensors by keyword, with a row a sample
Conditions = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass
class Captions:
    """Conditions of captions.

    Args:
        of: the numbers of images -> their condition, each tensor a row an image.
        null: the condition of the empty caption, each tensor a row.
    """

    of: Callable[[list[int]], dict[str, Tensor]]
    null: dict[str, Tensor]


def balanced_labels(model: nn.Module, num_images: int, classes: Sequence[int] = ()) -> Tensor:
    """Labels 0, 1, …, num_classes − 1, 0, …: [num_images]; zeros for an unconditional model.

    Args:
        classes: these in turn, in place of all.

    Raises:
        UserError: classes that the model does not know.
    """
    count = num_classes(model)
    odd = [label for label in classes if not 0 <= label < count]
    if odd:
        known = f"knows classes 0 to {count - 1}" if count else "takes no classes"
        raise UserError(f"classes={list(classes)}: the model {known}.")
    chosen = torch.tensor(classes or range(max(1, count)))
    return chosen[torch.arange(num_images) % len(chosen)]


def spread(total: int, count: int) -> Tensor:
    """`count` of the numbers 0 … total − 1, [count]: every prefix lies evenly over them, each once before one
    comes again. For what is to stand for a data set in some order, such as by class.
    """
    stride = next(
        step for step in itertools.count(max(1, round(total * (5**0.5 - 1) / 2))) if math.gcd(step, total) == 1
    )
    return torch.arange(count) * stride % total


def sampled_as_trained(config: SamplingConfig, scheduler: Any) -> SamplingConfig:
    """A config whose sampler is the scheduler of a flow, or of EDM, where it was left at the default, DDIM."""
    is_other = config.scheduler == SamplingConfig.scheduler and (is_flow(scheduler) or is_edm(scheduler))
    return replace(config, scheduler=type(scheduler).__name__) if is_other else config


@torch.no_grad()
def generate(
    model: nn.Module,
    scheduler: Any,
    config: SamplingConfig,
    labels: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
    on_batch: Callable[[int], None] | None = None,
    captions: Captions | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Images [B, C, H, W] on the CPU, in the range the model was trained on.

    Under `accelerate launch` the processes share the images; each returns all of them. Experts on the model that fix
    the sampler's timesteps are followed; their number must be the config's, as `Experts.sampling` sees to.

    Args:
        model: a denoiser, patched or not, on any device. It is put in eval mode.
        scheduler: the one the model was trained with.
        labels: classes [num_images]; by default all classes in turn.
        shape: C, H, W of an image, by default the model's own.
        on_batch: called with the number of images done after each batch.
        captions: conditions of a model that takes captions, in place of labels.
        decode: makes images of latents, a batch at a time.
        numbers: which of the num_images are made, by this process alone; all by default.

    Raises:
        UserError: an unknown scheduler, guidance on an unconditional model or in no interval, or other than num_images
            labels.
    """
    if config.guidance_scale != 1.0 and null_label(model) is None and captions is None:
        raise UserError(f"guidance_scale={config.guidance_scale} needs a model with a label for no class; use 1.")
    check_interval(config.guidance_interval)
    is_limited = config.guidance_interval != SamplingConfig().guidance_interval
    if is_limited:
        check_tells_timesteps(scheduler, "sampling.guidance_interval")
    if config.guide and guide_on(find_denoiser(model)) is None:
        raise UserError(f"The guide '{config.guide}' is not on the model: `attach_guide` puts it there.")
    unguided = replace(config, guidance_scale=1.0)
    labels = balanced_labels(model, config.num_images) if labels is None else labels
    if len(labels) != config.num_images:
        raise UserError(f"{len(labels)} labels for num_images={config.num_images}.")
    shape = shape or sample_shape(model)
    model.eval()

    def denoise(indices: list[int]) -> Tensor:
        generators = [image_generator(config.seed, index) for index in indices]
        batch_conditions = conditions(model, labels, captions, indices)
        sampler = make_sampler(config.scheduler, scheduler, config.timestep_spacing)
        experts = experts_on(find_denoiser(model))
        if experts is not None and experts.timesteps is not None:
            pin_timesteps(sampler, experts.timesteps)
        set_steps(sampler, config.num_inference_steps, config.scheduler)
        device = next(model.parameters()).device
        sample = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sample = (sample * sampler.init_noise_sigma if hasattr(sampler, "init_noise_sigma") else sample).to(device)
        keeps_variance = getattr(sampler.config, "variance_type", None) in ("learned", "learned_range")
        options = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
        for timestep in sampler.timesteps:
            scaled = sampler.scale_model_input(sample, timestep) if hasattr(sampler, "scale_model_input") else sample
            level = float(timestep) / scheduler.config.num_train_timesteps
            is_guided = not is_limited or config.guidance_interval[0] <= level <= config.guidance_interval[1]
            here = config if is_guided else unguided
            output = guided(model, scaled, timestep.to(device), batch_conditions, here).float()
            if learns_sigma(model) and not keeps_variance:
                output = output.chunk(2, dim=1)[0]
            sample = sampler.step(output, timestep, sample, return_dict=False, **options)[0]
        return sample if decode is None else decode(sample)

    return in_batches(denoise, config, on_batch, numbers)


def in_batches(
    make: Callable[[list[int]], Tensor],
    config: SamplingConfig,
    on_batch: Callable[[int], None] | None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """All images, on the CPU and in their order; the processes share them, a batch at a time.

    Where memory is short, batches are halved until they fit.

    Args:
        make: the numbers of a batch's images -> the images.
        numbers: of images that this process makes alone, in place of its share.

    Raises:
        UserError: no image is asked for, or there is no memory for one.
    """
    state = processes()
    shares = np.array_split(np.arange(config.num_images), state.num_processes)
    own: list[int] = shares[state.process_index].tolist() if numbers is None else list(numbers)
    batches, first, size = [], 0, config.batch_size
    while first < len(own):
        indices = own[first : first + size]
        made = _made(make, indices)
        if made is None:
            size = len(indices) // 2
            _LOGGER.warning("Out of memory with %d images at a time: going on with %d.", len(indices), size)
            continue
        batches.append(made)
        first += len(indices)
        if on_batch is not None:
            on_batch(len(indices))
    images = torch.cat(batches or [torch.empty(0)])  # torch.cat passes over a process's nothing
    return torch.cat(gather_object([images])) if state.num_processes > 1 and numbers is None else images


def _made(make: Callable[[list[int]], Tensor], indices: list[int]) -> Tensor | None:
    """A batch on the CPU; None where there is no memory for more than one image of it.

    Raises:
        UserError: there is none for that one.
    """
    try:
        return make(indices).float().cpu()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(indices) == 1:
            raise UserError(
                "Out of memory with one image at a time: hold the model in less memory (docs/memory.md)."
            ) from error
    clear_device_cache(garbage_collection=True)  # out here, where the error's traceback holds nothing any more
    return None


def conditions(model: nn.Module, labels: Tensor, captions: Captions | None, indices: list[int]) -> Conditions:
    """The condition of some images, and none, as guidance needs it."""
    device, dtype = next(model.parameters()).device, input_dtype(model)
    if captions is None:
        if not num_classes(model):
            return {}, {}
        own = labels[indices].to(device)
        return {"class_labels": own}, {"class_labels": torch.full_like(own, null_label(model) or 0)}

    def ready(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    condition = {name: ready(value) for name, value in captions.of(indices).items()}
    return condition, {name: ready(captions.null[name]).expand_as(value) for name, value in condition.items()}


def guided(
    model: nn.Module, sample: Tensor, timestep: Tensor, conditions: Conditions, config: SamplingConfig
) -> Tensor:
    """The model's output, moved away from the unconditional one by the guidance scale (arXiv 2207.12598)."""
    sample = sample.to(input_dtype(model))
    condition, null = conditions
    if config.guidance_scale == 1.0:
        return predict(model, sample, timestep.expand(len(sample)), condition)
    both = torch.cat([sample, sample])
    both_conditions = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
    conditional, unconditional = predict(model, both, timestep.expand(len(both)), both_conditions).chunk(2)
    channels = config.guidance_channels or sample.shape[1]
    guided = unconditional + config.guidance_scale * (conditional - unconditional)
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def image_generator(seed: int, index: int) -> Generator:
    """Of all that is drawn for one image."""
    return generator_for(torch.device("cpu"), seed, index)
