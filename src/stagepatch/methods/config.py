"""The choices of the methods that are compared with a patch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), by peft.

    Args:
        rank: r of every adapter; alpha is the same, so that the adapters are not scaled.
        targets: names, or ends of names, of the layers; by default the attention's projections.
        min_rank: ranks that are on at pure noise; the others come on in proportion as noise falls (T-LoRA,
            arXiv 2507.05964). 0, or `rank`, is plain LoRA.
    """

    rank: int = 8
    targets: list[str] | None = None
    min_rank: int = 0
