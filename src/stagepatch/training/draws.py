"""What an iteration draws: the share of x_start, noise, timesteps and condition of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from stagepatch.core import CAPTION, FAKES, GLOBAL, NOISE, BatchOrder, UserError, generator_for, seed_for
from stagepatch.data import normalized
from stagepatch.diffusion import Objective
from stagepatch.families import input_dtype, null_label, num_classes
from stagepatch.sampling import Fakes
from stagepatch.training.config import TrainingConfig


@dataclass
class Draws:
    """x_start and noise [B, C, H, W], timesteps [B], and the condition, each tensor a row a sample.

    Where images have masks: weights of each place in the loss, [B, 1, H, W], with mean 1 in each sample.
    Where the model's own samples are told from training images: as many of them, and their condition.
    """

    x_start: Tensor
    noise: Tensor
    timesteps: Tensor
    condition: dict[str, Tensor]
    fakes: Tensor | None = None
    fake_condition: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    def rows(self, rows: slice) -> Draws:
        """Some of the samples."""
        condition, of_fakes = (
            {name: value[rows] for name, value in each.items()} for each in (self.condition, self.fake_condition)
        )
        fakes, weights = (None if each is None else each[rows] for each in (self.fakes, self.weights))
        return Draws(self.x_start[rows], self.noise[rows], self.timesteps[rows], condition, fakes, of_fakes, weights)

    def tensors(self) -> tuple[Any, ...]:
        """What a loss takes."""
        drawn = (self.x_start, self.noise, self.timesteps, self.condition)
        if self.fakes is not None:
            return (*drawn, self.fakes, self.fake_condition)
        return drawn if self.weights is None else (*drawn, self.weights)

    def split(self, parts: int) -> Iterator[Draws]:
        """In pieces of equal size."""
        size = len(self.x_start) // parts
        for first in range(0, len(self.x_start), size):
            yield self.rows(slice(first, first + size))


def load_batches(
    dataset: Any, batch_size: int, start: int, stop: int, seed: int, num_workers: int, *share: int
) -> DataLoader[dict[str, Any]]:
    """The batches of iterations start to stop − 1, or one process's share of each; see `BatchOrder`.

    Args:
        dataset: one with a method `groups()` gives indices of items that a batch may hold together; one with
            `caption_counts` is asked for an item by its number and that of a caption, see `WithCaptions`.
        share: number of the process, and of processes.
    """
    groups = dataset.groups() if hasattr(dataset, "groups") else [range(len(dataset))]
    order = BatchOrder(groups, batch_size, start, stop, seed, *share)
    counts: Tensor | None = getattr(dataset, "caption_counts", None)
    batches: Any = order if counts is None else WithCaptions(order, counts)
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers)


@dataclass
class WithCaptions:
    """The items of each iteration, each with the number of one of its captions, all alike probable.

    Drawn for the whole batch, of which a process takes its rows.

    Args:
        order: of the items.
        counts: captions of each item of the dataset, [N].
    """

    order: BatchOrder
    counts: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, cpu = self.order, torch.device("cpu")
        first = order.process * (order.batch_size // order.num_processes)
        for iteration, items in enumerate(order, order.start):
            generator = generator_for(cpu, CAPTION, order.seed, iteration)
            drawn = torch.randint(2**62, (order.batch_size,), generator=generator)[first : first + len(items)]
            yield list(zip(items, (drawn % self.counts[items]).tolist(), strict=True))


class Conditions:
    """A batch's condition as the model takes it, and what stands for no condition (arXiv 2207.12598).

    Args:
        dataset: one of captions has a `null_condition`, that of the empty caption.
    """

    def __init__(self, model: nn.Module, dataset: Any) -> None:
        self.dtype = input_dtype(model)
        self.classes, self.null_label = num_classes(model), null_label(model)
        self.null_condition: dict[str, Tensor] | None = getattr(dataset, "null_condition", None)

    def of(self, batch: dict[str, Any], dropped: Tensor, flipped: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of each sample, or none where `dropped` [B], but for the pictures that it is the edit of.

        Args:
            flipped: which samples are mirrored, [B], and so their pictures.
        """
        if "condition" in batch:
            null = batch.get("null_condition", self.null_condition)
            condition = {name: self._caption(value, null, name, dropped) for name, value in batch["condition"].items()}
            if "references" in batch:
                flipped = torch.zeros_like(dropped) if flipped is None else flipped
                condition["reference_latents"] = _either_way(batch, "references", flipped).to(self.dtype)
            return condition
        if not self.classes:
            return {}
        labels: Tensor = batch["label"]
        if int(labels.max()) >= self.classes:
            raise UserError(f"The data have label {int(labels.max())}, but the model knows {self.classes} classes.")
        labels = labels.to(dropped.device)
        return {"class_labels": labels if self.null_label is None else torch.where(dropped, self.null_label, labels)}

    def _caption(self, value: Tensor, nulls: dict[str, Tensor] | None, name: str, dropped: Tensor) -> Tensor:
        value = value.to(dropped.device)
        if nulls is not None:
            null = nulls[name].to(dropped.device)
            value = torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null, value)
        return value.to(self.dtype) if value.is_floating_point() else value


def draw(
    batch: dict[str, Any],
    config: TrainingConfig,
    objective: Objective,
    conditions: Conditions,
    iteration: int,
    horizontal_flip: bool,
    device: torch.device,
    process_index: int = 0,
    fakes: Fakes | None = None,
) -> Draws:
    """This process's draws.

    Drawn for the whole batch, of which a process takes its rows: the number of processes changes nothing.

    Args:
        batch: "image" [B, C, H, W] and "label" [B]; or of latents, mean "image" and standard deviation "std" of the
            encoder's posterior, with "image_flipped" and "std_flipped" those of the mirrored image; with captions,
            "condition", tensors by keyword, and where these are read with pictures "null_condition"; with masks,
            "mask" [B, 1, H, W]; of edits, latents of the "references" [B, R, C, H, W] and "references_flipped".
        fakes: the model's own samples, of which as many are drawn as there are images.
    """
    torch.manual_seed(seed_for(GLOBAL, config.seed, process_index, iteration))
    generator = generator_for(device, NOISE, config.seed, iteration)
    share = len(batch["image"])
    own = slice(process_index * share, (process_index + 1) * share)
    size = config.batch_size
    timesteps = objective.draw_timesteps(size, generator)[own]
    noise = torch.randn(size, *batch["image"].shape[1:], generator=generator, device=device)[own]
    flipped = torch.zeros(share, dtype=torch.bool, device=device)
    if horizontal_flip:
        flipped = torch.rand(size, generator=generator, device=device)[own] < 0.5
    dropped = torch.zeros(share, dtype=torch.bool, device=device)
    if conditions.null_label is not None or conditions.null_condition is not None:
        dropped = torch.rand(size, generator=generator, device=device)[own] < config.label_dropout
    x_start = _x_start(batch, flipped, size, own, generator)
    drawn = Draws(x_start, noise, timesteps, conditions.of(batch, dropped, flipped))
    if "mask" in batch:
        drawn.weights = normalized(_either_way(batch, "mask", flipped))
    if fakes is not None:
        chosen = torch.randint(
            len(fakes), (size,), generator=generator_for(torch.device("cpu"), FAKES, config.seed, iteration)
        )
        of_fakes = fakes.batch(chosen[own])
        drawn.fakes = of_fakes["image"].to(device, torch.float32)
        drawn.fake_condition = conditions.of(of_fakes, dropped)
    return drawn


def _x_start(batch: dict[str, Any], flipped: Tensor, size: int, own: slice, generator: Generator) -> Tensor:
    images = _either_way(batch, "image", flipped)
    if "std" not in batch:
        return images
    noise = torch.randn(size, *images.shape[1:], generator=generator, device=images.device)[own]
    return images + _either_way(batch, "std", flipped) * noise


def _either_way(batch: dict[str, Any], name: str, flipped: Tensor) -> Tensor:
    values: Tensor = batch[name].to(flipped.device, torch.float32)
    mirrored = batch.get(f"{name}_flipped")
    mirrored = values.flip(-1) if mirrored is None else mirrored.to(values.device, torch.float32)
    return torch.where(flipped.view(-1, *[1] * (values.ndim - 1)), mirrored, values)
