"""Samples of a model as it is, kept as files, to tell from training images.

`plan.json` says whose they are; each file holds samples and the training items whose condition they took, whole or
absent. Making them goes on where it was stopped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stagepatch.checkpoints import module_fingerprint
from stagepatch.core import (
    FAKES,
    UserError,
    check_unchanged,
    generator_for,
    processes,
    progress_bar,
    read_json,
    read_tensors,
    seed_for,
    write_json,
    write_tensors,
)
from stagepatch.families import num_classes
from stagepatch.sampling.config import SamplingConfig
from stagepatch.sampling.generation import Captions, generate

PLAN_NAME = "plan.json"
FAKES_PER_FILE = 1000
_CHANGES_NOTHING = ("batch_size",)


@dataclass
class Fakes(Dataset[dict[str, Any]]):
    """Samples, and their conditions; a data set of them.

    Args:
        samples: [M, C, H, W], in the range (or the latent space) that the model was trained on.
        items: [M], numbers of the training items whose class or caption they were sampled with.
        dataset: of those items.
    """

    samples: Tensor
    items: Tensor
    dataset: Any

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def null_condition(self) -> dict[str, Tensor] | None:
        """That of the empty caption, where there are captions."""
        return getattr(self.dataset, "null_condition", None)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.batch(torch.tensor([index]))
        condition = {"condition": {name: value[0] for name, value in batch.pop("condition", {}).items()}}
        return {name: value[0] for name, value in batch.items()} | (condition if condition["condition"] else {})

    def batch(self, chosen: Tensor) -> dict[str, Any]:
        """Some of them, as a batch of the dataset would be; `chosen` [B] are their numbers."""
        batch: dict[str, Any] = {"image": self.samples[chosen]}
        items = self.items[chosen].tolist()
        if self.null_condition is not None:
            batch["condition"] = _conditions(self.dataset, items)
        else:
            batch["label"] = _labels(self.dataset, items)
        return batch


def load_fakes(directory: Path, model: nn.Module, scheduler: Any, dataset: Any, config: SamplingConfig) -> Fakes:
    """The samples of a directory; what is missing of them is made first. Processes share the work.

    Args:
        model: the model as it is, on its device.
        scheduler: the one it was trained with.
        dataset: the training data: a sample's class or caption is that of one of its items, as probable as training
            shows it often.
        config: how they are sampled, and how many.

    Raises:
        UserError: the directory holds another model's samples, or images of several sizes.
    """
    groups = dataset.groups() if hasattr(dataset, "groups") else [range(len(dataset))]
    if len(groups) > 1:
        raise UserError("The model's own samples are of one size, but the training images of several: crop them.")
    state = processes()
    plan = {
        "model": module_fingerprint(model),
        "scheduler": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        "sampling": config,
        "items": len(groups[0]),
    }
    if (directory / PLAN_NAME).exists():
        found = f"'{directory}' holds samples of another model or of other settings"
        way_out = "Give another ddo.fakes, or delete this one."
        check_unchanged(read_json(directory / PLAN_NAME), plan, found, way_out, ignored=_CHANGES_NOTHING)
    elif state.is_main_process:
        write_json(directory / PLAN_NAME, {**plan, "sampling": asdict(config)})
    state.wait_for_everyone()
    order = torch.tensor(groups[0])
    items = order[torch.randint(len(order), (config.num_images,), generator=_generator(config))]
    samples = []
    with progress_bar(disable=not state.is_main_process) as progress:
        task = progress.add_task("samples of the model", total=config.num_images, status="")
        for number, part in enumerate(items.split(FAKES_PER_FILE)):
            path = directory / f"{number:05d}.safetensors"
            if not path.exists():
                own = replace(config, num_images=len(part), seed=seed_for(FAKES, config.seed, number))
                advance = partial(progress.advance, task)
                made = _sample(model, scheduler, dataset, part.tolist(), own, advance)
                if state.is_main_process:
                    write_tensors(path, {"samples": made, "items": part})
                state.wait_for_everyone()
            else:
                progress.advance(task, len(part))
            samples.append(read_tensors(path)[0]["samples"])
    return Fakes(torch.cat(samples), items, dataset)


def _sample(
    model: nn.Module, scheduler: Any, dataset: Any, items: list[int], config: SamplingConfig, on_batch: Any
) -> Tensor:
    shape = tuple(dataset[0]["image"].shape)
    null = getattr(dataset, "null_condition", None)
    if null is not None:
        captions = Captions(lambda indices: _conditions(dataset, [items[index] for index in indices]), null)
        return generate(model, scheduler, config, None, shape, on_batch, captions)
    labels = _labels(dataset, items) if num_classes(model) else None
    return generate(model, scheduler, config, labels, shape, on_batch)


def _conditions(dataset: Any, items: list[int]) -> dict[str, Tensor]:
    rows = [dataset[item]["condition"] for item in items]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _labels(dataset: Any, items: list[int]) -> Tensor:
    """Classes of items, [B], without reading images where the dataset knows them."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return torch.tensor([int(dataset[item]["label"]) for item in items])
    return torch.as_tensor(labels() if callable(labels) else labels)[items]


def _generator(config: SamplingConfig) -> torch.Generator:
    return generator_for(torch.device("cpu"), FAKES, config.seed)
