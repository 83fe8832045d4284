"""DeMe's consistency loss around any method (arXiv 2410.06664, supplement): stay near what the original says. And that
of Spectral Diffusion (arXiv 2211.17106), which weighs it by frequency."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.families import learns_sigma
from stagepatch.methods.base import Method

_LEAST = 0.01  # magnitude; a frequency that an image lacks would weigh without bound


def spectral_distance(expected: Tensor, output: Tensor, x_start: Tensor) -> Tensor:
    """Squared distance of two predictions' spectra, each frequency weighed by one over its magnitude in the image.

    The weights are those of spectrum-aware distillation with α = −1 (arXiv 2211.17106). The transform is orthonormal:
    with all weights 1 this would be the mean squared distance.

    Args:
        expected, output, x_start: [B, C, H, W], or of videos [B, C, F, H, W].

    Returns:
        A scalar, the mean over all frequencies.
    """
    difference: Tensor = torch.fft.fft2(output.float() - expected.float(), norm="ortho").abs().square()
    magnitude: Tensor = torch.fft.fft2(x_start.float(), norm="ortho").abs().clamp_min(_LEAST)
    return (difference / magnitude).mean()


class Consistent(Method):
    """Adds ‖ε_θ(x_t, t) − ε_θi(x_t, t)‖², mean over the batch, for the frozen original θ.

    It keeps a copy of the model until `close`: what trains need not be apart from it.

    Args:
        method: what trains, and how it is saved.
        weight: of the loss (DeMe: 1).
        original: θ, where it is another than the model as training finds it.
        spectral: weight of `spectral_distance`, besides.
    """

    def __init__(
        self, method: Method, weight: float = 1.0, original: nn.Module | None = None, spectral: float = 0.0
    ) -> None:
        self.method = method
        self.weight = weight
        self.spectral = spectral
        self.original: nn.Module | None = None
        self._given = original
        self._handle: Any = None
        self._last: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        self.close()
        original = copy.deepcopy(model) if self._given is None else self._given
        device = next(model.parameters()).device
        self.original = original.to(device).requires_grad_(False).eval()
        groups = self.method.prepare(model)
        self._handle = model.register_forward_hook(self._note, with_kwargs=True)
        return groups

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self.original = self._last = None

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._last = (args, kwargs, output[0])

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        assert self._last is not None, "a forward of the model comes first"
        assert self.original is not None
        args, kwargs, output = self._last
        self._last = None
        with torch.no_grad():
            expected: Tensor = self.original(*args, **kwargs)[0]
        if learns_sigma(self.original):
            expected, output = (each.chunk(2, dim=1)[0] for each in (expected, output))
        consistency = (output.float() - expected.float()).square().mean()
        self.method.progress = self.progress
        extra, logged = self.method.extra_loss()
        total = self.weight * consistency + (0.0 if extra is None else extra)
        logged = {**logged, "consistency": consistency.detach()}
        if self.spectral:
            assert self.x_start is not None, "the loss says what the images were"
            spectral = spectral_distance(expected, output, self.x_start)
            total, logged["spectral"] = total + self.spectral * spectral, spectral.detach()
        return total, logged

    def start_from(self, model: nn.Module, directory: Path) -> None:
        self.method.start_from(model, directory)

    def save(self, directory: Path) -> None:
        self.method.save(directory)

    def load(self, model: nn.Module, directory: Path) -> None:
        self.method.load(model, directory)
