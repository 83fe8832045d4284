"""Generation with a whole pipeline of diffusers: captions or classes in, images out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stagepatch.core import UserError
from stagepatch.families import find_denoiser
from stagepatch.sampling.config import SamplingConfig
from stagepatch.sampling.generation import balanced_labels, image_generator, in_batches

# Draws the tokens of a whole batch by the first image's generator.
_ONE_BY_ONE = ("GlmImagePipeline",)
# Whose tensors are the model's own, from −1 to 1, which IF's safety checker has not seen.
_OF_RAW_TENSORS = ("IFPipeline", "KandinskyV22Pipeline", "KandinskyV22CombinedPipeline")


@torch.no_grad()
def generate_with_pipeline(
    pipe: Any,
    config: SamplingConfig,
    prompts: list[str],
    on_batch: Callable[[int], None] | None = None,
    classes: Sequence[int] = (),
    call: Mapping[str, Any] | None = None,
) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] on the CPU, with the pipeline's own scheduler, at its own size.

    Of a pipeline of videos the frames, one video after the other.

    Image i has prompt i modulo their number, or class i modulo theirs, and noise of (seed, i) alone.

    Args:
        classes: labels in turn, of a pipeline that takes them; all by default.
        config: its scheduler, timestep_spacing, guidance_channels and guidance_interval do not apply here.
        on_batch: called with the number of images done after each batch.
        call: further arguments of the pipeline's call.

    Raises:
        UserError: a pipeline of captions without prompts, classes or arguments that it does not know.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in takes and not prompts:
        raise UserError(f"{type(pipe).__name__} makes images of captions: give --prompts '[\"a caption\", …]'.")
    unknown = set(call or ()) - set(takes)
    if unknown:
        raise UserError(f"The call of {type(pipe).__name__} takes no '{min(unknown)}'. It takes: {', '.join(takes)}.")
    takes_labels = "class_labels" in takes
    labels = balanced_labels(find_denoiser(pipe), config.num_images, classes) if takes_labels else torch.empty(0)
    if "image_embeds" in takes and not {"image_embeds", "negative_image_embeds"} <= set(call or ()):
        raise UserError(
            f"{type(pipe).__name__} makes images of image_embeds, which its prior makes of captions: save both as "
            f"one, by AutoPipelineForText2Image of diffusers, and give that."
        )
    output_type = "np" if type(pipe).__name__ in _OF_RAW_TENSORS else "pt"
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ in _ONE_BY_ONE:
        config = replace(config, batch_size=1)

    def make(indices: list[int]) -> Tensor:
        options: dict[str, Any] = {"generator": [image_generator(config.seed, index) for index in indices]}
        if "prompt" in takes:
            options["prompt"] = [prompts[index % len(prompts)] for index in indices]
        elif takes_labels:
            options["class_labels"] = labels[indices].tolist()
        if "guidance_scale" in takes:
            options["guidance_scale"] = config.guidance_scale
        options["num_inference_steps"] = config.num_inference_steps
        options |= {"output_type": output_type, "return_dict": False, **(call or {})}
        made = pipe(**options)[0]
        if output_type == "np":
            return torch.from_numpy(made).movedim(-1, 1)
        images: Tensor = made.float()
        return images.flatten(0, 1) if images.ndim == 5 else images

    return in_batches(make, config, on_batch) * 2.0 - 1.0
