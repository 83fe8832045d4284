"""Guidance by a worse version of the model itself: autoguidance (arXiv 2406.02507), SIMS (arXiv 2408.16333)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stagepatch.diffusion import check_tells_timesteps
from stagepatch.families import find_denoiser, learns_sigma, sample_shape
from stagepatch.families.registry import family_of
from stagepatch.methods import open_artifact
from stagepatch.sampling.config import SamplingConfig, check_interval
from stagepatch.sampling.experts import check_fits
from stagepatch.sampling.experts_file import ExpertSource, load_expert
from stagepatch.sampling.stand_in import StandIn, check_free, combine


class Guide(StandIn):
    """Each output of a model becomes guide + w·(model − guide); `detach()`, or the end of a `with` block, restores it.

    A learned variance stays the model's own.

    Args:
        model: patched or not, now or later; a pipeline goes on calling it.
        worse: the guide: its outputs are moved away from.
        scale: w; 1 is no guidance.
        interval: least and most noise level t/T at which it acts; elsewhere the guide is not run.

    Raises:
        UserError: a guide of other inputs or outputs, no interval, or experts or a guide on the model already.
    """

    noun = "guides"

    def __init__(
        self, model: nn.Module, worse: nn.Module, scale: float = 2.0, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        check_free(model)
        check_interval(list(interval))
        check_fits(model, worse)
        super().__init__(model)
        self.worse = worse.eval()
        self.scale = scale
        self.interval = interval
        self._levels = family_of(type(model)).sample_levels
        self._channels = sample_shape(model)[0] if learns_sigma(model) else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(*args, **kwargs)
        if self.scale == 1.0 or not self._acts_at(self.timestep_of(args, kwargs)):
            return output
        return combine(self._away, output, self.worse(*args, **kwargs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _acts_at(self, timestep: Any) -> bool:
        if self.interval == (0.0, 1.0):
            return True
        level = float(self._levels(torch.as_tensor(timestep).double()).max())
        return self.interval[0] <= level <= self.interval[1]

    def _away(self, own: Tensor, worse: Tensor) -> Tensor:
        mixed = worse + self.scale * (own - worse)
        channels = self._channels or own.shape[1]
        return torch.cat([mixed[:, :channels], own[:, channels:]], dim=1)


def guide_on(model: nn.Module) -> Guide | None:
    """The guide attached to a model."""
    return model.forward if isinstance(model.forward, Guide) else None


def attach_guide(target: Any, scheduler: Any, config: SamplingConfig) -> Guide | None:
    """The guide that a config names, on a model or on a pipeline's denoiser that has nothing learned on it yet.

    What was learned shares the model's memory.

    Args:
        scheduler: the one that the model was trained with.

    Returns:
        None where it names none.

    Raises:
        UserError: nothing at that path that could be a guide, or it does not fit.
    """
    if not config.guide:
        return None
    model = find_denoiser(target)
    is_model = open_artifact(config.guide).kind == "model"
    place = {"model" if is_model else "learned": config.guide}
    worse = load_expert(ExpertSource("guide", **place), model, scheduler)
    assert worse is not None
    low, high = config.guidance_interval
    if (low, high) != (0.0, 1.0):
        check_tells_timesteps(scheduler, "sampling.guidance_interval")
    return Guide(model, worse, config.guide_scale, (low, high))
