"""The denoising objective: noisy inputs, targets, and the loss per sample."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Generator, Tensor

from stagepatch.core import UserError
from stagepatch.diffusion.noise_schedule import (
    at_timesteps,
    edm_sigmas,
    flow_sigmas,
    in_thousandths,
    is_edm,
    is_flow,
)
from stagepatch.diffusion.timesteps import DensitySampler, IntervalSampler, TimestepSampler
from stagepatch.diffusion.variational import Posterior
from stagepatch.diffusion.weighting import ERROR_FACTORS, Weighting, constant

_LOG_SIGMA = (-1.2, 1.2)  # mean and standard deviation of ln σ (EDM, Table 1)


@dataclass(eq=False)
class Objective:
    """What a scheduler's config asks of a denoiser.

    EDM (arXiv 2206.00364, Eq. 7) is v-prediction of x_start / σ_data, of the other sign: c_in·(x_start + σ·noise) is
    α·x_start / σ_data + s·noise with α = σ_data·c_in, s = σ·c_in, α² + s² = 1, and its F the negative of v. Constant
    weight is its λ(σ).

    Args:
        scheduler: a diffusers scheduler; its config decides betas (or sigmas) and prediction type. Whether it
            is made for training or for sampling does not matter, nor whether it has sampled.
        learn_sigma: the model's output holds the variance's interpolation behind its prediction (2C channels),
            trained by the bound of improved DDPM with the mean detached.
        weighting: weight of each sample's squared error.
        timesteps: draws timesteps; by default all alike, and of EDM ln σ as its paper does.

    Raises:
        UserError: a prediction type that is none of epsilon, v_prediction, sample, flow, or a scheduler that
            has no training schedule for it.
    """

    scheduler: Any
    learn_sigma: bool = False
    weighting: Weighting = constant
    timesteps: TimestepSampler | DensitySampler | IntervalSampler | None = None

    def __post_init__(self) -> None:
        scheduler = self.scheduler = in_thousandths(self.scheduler)
        self.is_flow, self.is_edm = is_flow(scheduler), is_edm(scheduler)
        self.prediction_type = "flow_prediction" if self.is_flow else scheduler.config.get("prediction_type")
        self._sign, self._unit = 1.0, 1.0  # of what the model predicts, and of x_start in it
        if self.is_edm:
            self._sign = -1.0 if self.prediction_type == "epsilon" else 1.0
            self._unit, self.prediction_type = scheduler.config.sigma_data, "v_prediction"
        has_formula = self.is_flow or self.is_edm
        if not has_formula and (self.prediction_type == "flow_prediction" or not hasattr(scheduler, "alphas_cumprod")):
            raise UserError(
                f"Cannot train with {type(scheduler).__name__} and prediction_type='{self.prediction_type}': "
                f"expected a scheduler with alphas_cumprod, such as DDPMScheduler, for a flow "
                f"FlowMatchEulerDiscreteScheduler, or EDMEulerScheduler."
            )
        if self.prediction_type not in ERROR_FACTORS:
            raise UserError(f"prediction_type='{self.prediction_type}' is none of {', '.join(ERROR_FACTORS)}.")
        if self.learn_sigma and has_formula:
            raise UserError("A flow, or EDM, has no posterior variance to learn: set learn_sigma to false.")
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self._posterior = Posterior(scheduler.betas) if self.learn_sigma else None
        # Not every sampler has get_velocity; the one made for training has, and shares their config.
        self._training_scheduler = None if has_formula else DDPMScheduler.from_config(scheduler.config)
        # x_t = signal·x_start + sigma·noise. In float64: in half precision, the first timesteps' 1 − ᾱ vanishes.
        if self.is_flow:
            self._sigmas = flow_sigmas(scheduler).double()
            self._signals = 1.0 - self._sigmas
        elif self.is_edm:
            sigmas = edm_sigmas(scheduler)
            self._told = sigmas.log() / 4.0
            c_in = (sigmas**2 + self._unit**2).rsqrt()
            self._signals, self._sigmas = self._unit * c_in, sigmas * c_in
        else:
            alphas_cumprod = scheduler.alphas_cumprod.double()
            self._sigmas = (1.0 - alphas_cumprod).sqrt()
            self._signals = alphas_cumprod.sqrt()

    @property
    def levels(self) -> Tensor:
        """The noise level, from 0 to 1, that the model is told at each timestep: [T], float64, rising. Of EDM, ln σ on
        its way from the least to the most.
        """
        timesteps = torch.arange(self.num_train_timesteps)
        return self._sigmas.cpu() if self.is_flow else timesteps.double() / self.num_train_timesteps

    def draw_timesteps(self, batch: int, generator: Generator) -> Tensor:
        """Timesteps [B], from 0 to T − 1, on the generator's device."""
        if self.timesteps is not None:
            return self.timesteps.draw(batch, generator)
        if self.is_edm:
            mean, deviation = _LOG_SIGMA
            log_sigmas = torch.randn(batch, generator=generator, device=generator.device) * deviation + mean
            first, last = (4.0 * float(end) for end in self._told[[0, -1]])
            places = (log_sigmas - first) / (last - first) * (self.num_train_timesteps - 1)
            return places.round().long().clamp(0, self.num_train_timesteps - 1)
        return torch.randint(0, self.num_train_timesteps, (batch,), generator=generator, device=generator.device)

    def add_noise(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x_start and noise of that shape, at timesteps [B]."""
        # In half precision, the noise of the first timesteps would be lost: 1 − ᾱ vanishes.
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        images, noise = x_start.to(dtype), noise.to(dtype)
        if self._training_scheduler is not None:
            x_t: Tensor = self._training_scheduler.add_noise(images, noise, timesteps)
        else:
            signal, sigma = self._signal_and_sigma(timesteps, images)
            x_t = signal / self._unit * images + sigma * noise
        return x_t.to(x_start.dtype)

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """The timesteps as the model takes them: [B]."""
        if self.is_flow:
            return at_timesteps(self._sigmas, timesteps, timesteps) * self.num_train_timesteps
        return at_timesteps(self._told, timesteps, timesteps) if self.is_edm else timesteps

    def target(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        if self.is_edm:
            signal, sigma = self._signal_and_sigma(timesteps, x_start)
            return self._sign * (signal * noise - sigma / self._unit * x_start)
        if self._training_scheduler is None:
            return noise - x_start
        return self._training_scheduler.get_velocity(x_start, noise, timesteps)  # type: ignore[no-any-return]

    def loss(
        self, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, mean over its dimensions: [B].

        Args:
            weights: of each place of a sample, [B, 1, H, W], with mean 1.

        The bound enters with weight T/1000: L_simple + 0.001·L_vlb of improved DDPM, where L_vlb sums T terms.
        """
        output = output.float()
        prediction = output
        if self.learn_sigma:
            prediction, interpolation = output.chunk(2, dim=1)
        error = (prediction - self.target(x_start, noise, timesteps)) ** 2
        error = error if weights is None else error * weights
        loss = self.weighting(self.snr(timesteps), self.prediction_type) * error.flatten(1).mean(dim=1)
        if self._posterior is not None:
            x_t = self.add_noise(x_start, noise, timesteps)
            predicted_x_start = self.predict_x_start(prediction.detach(), x_t, timesteps)
            bound = self._posterior.bound(x_start, x_t, timesteps, predicted_x_start, interpolation, weights)
            loss = loss + bound * (self.num_train_timesteps / 1000.0)
        return loss

    def predict_x_start(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """x_start as the model's prediction implies it: [B, C, H, W]."""
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._signal_and_sigma(timesteps, x_t)
        if self.prediction_type == "flow_prediction":
            return x_t - sigma * prediction
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return (signal * x_t - sigma * self._sign * prediction) * self._unit

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]: α²/σ² of x_t = α·x_start + σ·noise (EDM: of x_start / σ_data)."""
        signal, sigma = self._signal_and_sigma(timesteps, timesteps)
        return (signal / sigma) ** 2

    def _signal_and_sigma(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return at_timesteps(self._signals, timesteps, like), at_timesteps(self._sigmas, timesteps, like)
