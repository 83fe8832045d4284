"""What is measured against what: a model, images, or statistics, by what a user types.

`MODEL`, `MODEL+LEARNED` (a patch, a LoRA, weights, or a file of experts), `IMAGES`, `IMAGES:SPLIT`, `STATISTICS.npz`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stagepatch.checkpoints import BUNDLED as BUNDLED_MODELS
from stagepatch.checkpoints import has_vae, is_hub_id, load_captioner, takes_captions
from stagepatch.core import UserError, processes, read_tensors
from stagepatch.data import (
    BUNDLED,
    DataConfig,
    ImageDataset,
    Images,
    Part,
    Pictures,
    hold_out,
    load_dataset,
    open_source,
)
from stagepatch.evaluation.statistics_file import is_statistics
from stagepatch.families import num_classes, sample_shape
from stagepatch.methods import open_artifact
from stagepatch.sampling import Captions, LatentSampling, balanced_labels, load_decoder, spread

SPLITS: dict[str, Literal["train", "held_out", "tune"]]
SPLITS = {"train": "train", "held-out": "held_out", "held_out": "held_out", "tune": "tune"}
_SAMPLES = "samples.safetensors"
_LEARNED = ("patch", "LoRA", "weights", "weights and patch")
_FORMS = "a model, MODEL+PATCH, a folder or file of images, IMAGES:train, IMAGES:held-out, or statistics (.npz)"

Dataset = ImageDataset | Images | Part


@dataclass(frozen=True)
class NamedSource:
    """A source of images, as a user names it.

    Args:
        text: what was typed.
        path: of a model, of images or of statistics, or the name of bundled ones.
        split: of images: 'train', 'held_out' or 'tune'; '' for all.
        learned: what goes on the model: a directory, or a file of experts; '' for nothing.
    """

    text: str
    kind: Literal["model", "images", "statistics"]
    path: str
    split: Literal["", "train", "held_out", "tune"] = ""
    learned: str = ""


def name_source(text: str) -> NamedSource:
    """What a text names; nothing is loaded.

    Raises:
        UserError: nothing is there, or nothing that gives images.
    """
    path = Path(text)
    if path.exists() and text not in BUNDLED_MODELS:
        return NamedSource(text, _kind(path), text)
    name, _, split = text.rpartition(":")
    if name and split in SPLITS:
        return NamedSource(text, "images", name, SPLITS[split])
    if name in BUNDLED or (name and Path(name).exists()):
        close = difflib.get_close_matches(split, SPLITS, n=1)
        hint = f" Did you mean '{name}:{close[0]}'?" if close else ""
        raise UserError(f"'{text}': there is no split '{split}', but train, held-out, and of fashion tune.{hint}")
    model, _, learned = text.partition("+")
    if learned and not Path(learned).exists():
        raise UserError(f"Nothing at '{learned}', which '{text}' puts on a model.")
    is_on_hub = is_hub_id(model) and not Path(model).parent.is_dir()
    if model in BUNDLED_MODELS or is_on_hub or (learned and Path(model).exists()):
        return NamedSource(text, "model", model, learned=learned)
    beside = [str(path.parent / each.name) for each in path.parent.glob("*")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), [*beside, *BUNDLED_MODELS], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UserError(f"Nothing at '{text}'.{hint} What is measured is {_FORMS}.")


def _kind(path: Path) -> Literal["model", "images", "statistics"]:
    if is_statistics(path):
        return "statistics"
    if path.is_dir():
        try:
            kind = open_artifact(path).kind
        except UserError:
            return "images"
        if kind == "model":
            return "model"
        if kind in _LEARNED or kind.startswith("part of a"):
            raise UserError(f"'{path}' is a {kind}, which goes on a model: give MODEL+{path}.")
    elif path.suffix in (".yaml", ".yml"):
        raise UserError(f"'{path}' is a file of experts, which goes on a model: give MODEL+{path}.")
    return "images"


def load_images(named: NamedSource, data: DataConfig) -> Dataset:
    """The images that are named.

    Args:
        data: how they are read; its source is the named one. held_out is the share that ':held-out' is of, by the same
            hash of names as in training.

    Raises:
        UserError: nothing there, images of several sizes or modes, or no such split.
    """
    path = Path(named.path)
    if named.path in BUNDLED:
        dataset = load_dataset(replace(data, source=named.path), named.split or "train")
        assert isinstance(dataset, ImageDataset)
        return dataset
    if named.split == "tune":
        raise UserError(f"'{named.text}': only fashion has images to tune by.")
    if data.crop != "center":
        raise UserError(f"data.crop='{data.crop}' makes images of many sizes: metrics need crop 'center'.")
    samples = path / _SAMPLES if path.is_dir() else path
    if samples.suffix == ".safetensors" and samples.is_file():
        return _load_samples(samples, named)
    pictures = Pictures(open_source(replace(data, source=named.path)), replace(data, source=named.path))
    if not named.split:
        return pictures
    if not data.held_out:
        raise UserError(
            f"'{named.text}': say which share is held out, as by --data.held_out=0.1. It is chosen by a hash of the "
            f"images' names, as `stagepatch train` does."
        )
    part = hold_out(pictures, pictures.keys(), data.held_out)
    return part if named.split == "train" else part.held_out


def _load_samples(path: Path, named: NamedSource) -> ImageDataset:
    images = read_tensors(path)[0].get("images")
    if images is None or images.ndim != 4:
        raise UserError(f"'{path}' has no 'images' [B, C, H, W], as `stagepatch sample` writes them.")
    if named.split:
        raise UserError(f"'{named.text}': samples of a model have no split.")
    return ImageDataset(images.float().clamp(-1.0, 1.0), torch.zeros(len(images), dtype=torch.long))


def labels_of(dataset: Dataset) -> Tensor:
    """Classes of the items, [N], without reading images."""
    if isinstance(dataset, Part):
        return labels_of(dataset.dataset)[dataset.indices]
    return dataset.labels if isinstance(dataset, ImageDataset) else torch.tensor(dataset.labels())


def captions_of(dataset: Dataset) -> list[str]:
    """The first caption of each item; '' where there is none."""
    if isinstance(dataset, Part):
        captions = captions_of(dataset.dataset)
        return [captions[index] for index in dataset.indices]
    return [""] * len(dataset) if isinstance(dataset, ImageDataset) else [each[0] for each in dataset.captions()]


@dataclass
class Conditions:
    """What a model is sampled with.

    Args:
        labels: [num_images].
        latents: of a model with a VAE.
        captions: of each image, where the model takes any.
        said: in a sentence, where they come from; '' where there are none.
        digest: changes with them.
    """

    labels: Tensor
    latents: LatentSampling | None
    captions: list[str]
    said: str
    digest: str


def sampling_conditions(
    name: str, model: Any, count: int, dataset: Dataset | None, given: str, text_dtype: torch.dtype = torch.float32
) -> Conditions:
    """Labels or captions of a data set, in its shares whatever the count; labels of all classes in turn where it has
    none that the model knows.

    Args:
        name: of the model.
        model: its denoiser, loaded.
        dataset: whose labels or captions they are, if any.
        given: its name.
        text_dtype: that text encoders are loaded in.

    Raises:
        UserError: a model of captions, and no captions.
    """
    captions: Captions | None = None
    labels, said, texts = balanced_labels(model, count), "", list[str]()
    classes = num_classes(model)
    if classes:
        said = f"'{name}' is sampled with all its {classes} classes in turn."
        known = torch.empty(0, dtype=torch.long) if dataset is None else labels_of(dataset)
        if len(known.unique()) > 1 and int(known.max()) < classes:
            labels = known.sort().values[spread(len(known), count)]
            said = f"'{name}' is sampled with the labels of '{given}', in their shares."
    reads_captions = takes_captions(name)
    if not has_vae(name) and not reads_captions:
        return Conditions(labels, None, texts, said, _digest(labels, texts))
    if reads_captions:
        every = [] if dataset is None else captions_of(dataset)
        if not any(every):
            raise UserError(
                f"'{name}' makes images of captions, and '{given}' has none: name images that have, by --conditions."
            )
        texts = [every[index] for index in spread(len(every), count).tolist()]
        said = f"'{name}' is sampled with captions of '{given}'."
        encode = load_captioner(name, processes().device, text_dtype)
        captions = Captions(lambda indices: encode([texts[index] for index in indices]), encode([""]))
    latents = LatentSampling(sample_shape(model), load_decoder(name), captions)
    return Conditions(labels, latents, texts, said, _digest(labels, texts))


def _digest(labels: Tensor, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(labels.numpy().tobytes())
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()
