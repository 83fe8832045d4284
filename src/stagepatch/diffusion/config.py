"""The choices of an objective."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.core import check_numbers


@dataclass
class ObjectiveConfig:
    """Noise schedule and prediction target.

    Args:
        num_train_timesteps: T (DDPM, arXiv 2006.11239: 1000).
        beta_schedule: diffusers' name of the noise schedule; DMP (arXiv 2405.17825): cosine
            ('squaredcos_cap_v2') for FFHQ and COCO, 'linear' for ImageNet, 'scaled_linear' for Stable Diffusion.
        beta_start: first beta of the linear schedules (DDPM: 0.0001).
        beta_end: last beta of the linear schedules (DDPM: 0.02).
        prediction_type: what the model predicts, in diffusers' spelling; 'flow_prediction' is rectified flow
            (arXiv 2209.03003): noise − x_start.
        clip_sample: let samplers clip their estimate of x_start to [−1, 1]; for pixels, not for latents.
    """

    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    clip_sample: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, "objective.", num_train_timesteps=1, beta_start=(0, 1), beta_end=(0, 1))


@dataclass
class WeightingConfig:
    """Weight of each timestep in the loss.

    Args:
        name: 'constant' weighs all predictions alike; the others are stated as weights on the error of x_start:
            'snr' (for epsilon the same as constant), 'snr_plus_one' (for v the same as constant), 'truncated_snr'
            max(SNR, 1) (arXiv 2202.00512), 'min_snr' min(SNR, gamma) (arXiv 2303.09556), 'p2' SNR/(k + SNR)^gamma
            (arXiv 2204.00227).
        gamma: of min_snr (arXiv 2303.09556: 5) and p2 (arXiv 2204.00227: 1).
        k: of p2 (arXiv 2204.00227: 1).
    """

    name: Literal["constant", "snr", "snr_plus_one", "truncated_snr", "min_snr", "p2"] = "constant"
    gamma: float | None = None
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.gamma is None:
            self.gamma = 5.0 if self.name == "min_snr" else 1.0
        check_numbers(self, "weighting.")


@dataclass
class TimestepsConfig:
    """Which timesteps a run trains on, and how often.

    Args:
        range: least and most noise level that the model is told: t/T, and for a flow its sigma, after any shift.
        density: 'uniform' in t; 'logit_normal', 'mode' or 'cosmap' in t/T before a flow's shift (arXiv 2403.03206,
            Section 3.1); 'published' is the one that diffusers' script for the model has, see docs/noise-levels.md.
        logit_mean: of logit_normal; below 0 is more often near the image.
        logit_std: spread of logit_normal, in the logit of the noise level.
        mode_scale: s of mode; above 0 is more often in the middle.
        shift: s of what is drawn, t to s·t/(1 + (s − 1)·t); above 1 is more often near the noise, as larger images
            want it: √(m/n) for m tokens where n need none (the same paper, Eq. 23). A flow's own shift comes on top.
    """

    range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    density: Literal["uniform", "logit_normal", "mode", "cosmap", "published"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "timesteps.")
