"""The DiT of `stagepatch.models`: a site before every block."""

from __future__ import annotations

from stagepatch.backbones.base import Backbone, Site
from stagepatch.models import DiT


def describe(model: DiT) -> Backbone:
    """See `Backbone`."""
    side = model.config.sample_size // model.config.patch_size
    sites = tuple(
        Site(f"blocks.{index}", f"blocks.{index}", index, model.hidden_size, (side, side))
        for index in range(len(model.blocks))
    )
    return Backbone(
        model_class="DiT",
        sites=sites,
        time_tap="t_embedder",
        condition_taps=() if model.y_embedder is None else ("y_embedder",),
        condition_channels=model.hidden_size,
    )
