"""Pictures while a run trains: the base and what is learned so far, from the same noise."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagepatch.checkpoints import takes_captions
from stagepatch.core import UserError, processes
from stagepatch.sampling import balanced_labels, generate, prompted_latents, sampled_as_trained
from stagepatch.training.assistant import Assistant
from stagepatch.training.log import RunLog
from stagepatch.training.validation_config import ValidationConfig

VALIDATION = "validation"


class Validation:
    """Pictures in 'validation/' of a run's directory, base left and learned right, equal places from equal noise.

    Captions are encoded once, here, and the base sampled; the VAE stays for decoding.

    Args:
        config: see `ValidationConfig`.
        source: directory of the model with its VAE and text encoder; empty for a model in pixels.
        model: the base, before anything is put on it.
        scheduler: the one that it was trained with.
        directory: of the run.
        text_dtype: that text encoders are loaded in.
        assistant: on the model while it trains; off in pictures.

    Raises:
        UserError: no steps between pictures, captions that are missing, or a sampler that the model cannot be sampled
            by.
    """

    def __init__(
        self,
        config: ValidationConfig,
        source: str,
        model: nn.Module,
        scheduler: Any,
        directory: Path,
        text_dtype: torch.dtype = torch.float32,
        assistant: Assistant | None = None,
    ) -> None:
        if config.every < 0:
            raise UserError(f"validation.every={config.every} must be 0 or more.")
        self.config, self.directory = config, directory / VALIDATION
        self._assistant = assistant
        self._scheduler, self._sampling = scheduler, sampled_as_trained(config.sampling, scheduler)
        self._labels = balanced_labels(model, self._sampling.num_images, config.classes)
        if source and takes_captions(source) and not config.prompts:
            raise UserError(
                f"'{source}' makes pictures of captions: give --validation.prompts '[\"a caption\", …]', or leave "
                f"validation.every at 0."
            )
        latents = prompted_latents(source, model, config.prompts, text_dtype) if source else None
        self._latents = {} if latents is None else vars(latents)
        self._base = self._sample(model)

    def is_due(self, done: int, steps: int) -> bool:
        """Whether a picture is due after `done` steps of `steps`."""
        return self.config.every > 0 and (done % self.config.every == 0 or done == steps)

    def __call__(self, model: nn.Module, done: int, log: RunLog) -> None:
        """A picture of the model as it is, after so many steps; processes share the work."""
        from stagepatch.report import paired_grid, write_picture  # matplotlib is slow to import

        images = self._sample(model)
        if processes().is_main_process:
            columns = min(4, len(images))
            picture = paired_grid(self._base, images, columns)
            write_picture(self.directory / f"{done:07d}.png", picture)
            log.show(VALIDATION, picture, done)

    def _sample(self, model: nn.Module) -> torch.Tensor:
        with self._assistant.set(False) if self._assistant else contextlib.nullcontext():
            return generate(model, self._scheduler, self._sampling, self._labels, **self._latents)
