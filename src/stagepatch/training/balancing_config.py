"""The choices of balancing the losses of intervals of timesteps."""

from dataclasses import dataclass
from typing import Literal

from stagepatch.core import check_numbers


@dataclass
class BalancingConfig:
    """Intervals of timesteps as tasks whose losses are balanced (ANT, arXiv 2306.00354).

    Args:
        name: 'none'; 'uncertainty', log-variances that are learned weigh the intervals' losses (arXiv 1705.07115);
            'pcgrad', gradients of intervals that point against each other are projected (arXiv 2001.06782); or 'nash',
            they are weighed so that none gives way to another (Nash-MTL, arXiv 2202.01017). The latter two hold as
            many gradients as there are intervals.
        clustering: how the timesteps are cut: 'timestep', in equal intervals; 'snr' or 'gradient', by dynamic
            programming on log-SNR, or on the similarity of gradients.
        num_intervals: k (ANT's released code: 5); every batch holds as many samples of each.
        similarity: analysis.json of `stagepatch analyze` on the model, for clustering 'gradient'.
        log_variance_learning_rate: AdamW's rate for the log-variances (ANT's released code: 0.025).
    """

    name: Literal["none", "uncertainty", "pcgrad", "nash"] = "none"
    clustering: Literal["timestep", "snr", "gradient"] = "timestep"
    num_intervals: int = 5
    similarity: str = ""
    log_variance_learning_rate: float = 0.025

    def __post_init__(self) -> None:
        check_numbers(self, "balancing.", num_intervals=2, log_variance_learning_rate=0)
