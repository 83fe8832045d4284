"""The first samples of two models from the same noise, kept with what was collected of them, for the page."""

from pathlib import Path

from torch import Tensor

from stagepatch.core import read_tensors, write_tensors
from stagepatch.report import Comparison, samples_shown


def keep_shown(path: Path, images: Tensor) -> None:
    """As many of images [B, C, H, W] as the page shows."""
    write_tensors(path, {"images": images[: samples_shown(images.shape[-1])].clone()})


def shown_samples(title: str, paths: tuple[Path, Path], labels: tuple[str, str]) -> list[Comparison]:
    """Of two models, of which a slider goes from one to the other; nothing where they are of different sizes."""
    one, other = (read_tensors(path)[0]["images"] for path in paths)
    if one.shape != other.shape:
        return []
    caption = f"Equal places are from the same noise: '{labels[0]}' left of the slider, '{labels[1]}' right of it."
    return [Comparison.of_samples(title, one, other, labels, caption)]
