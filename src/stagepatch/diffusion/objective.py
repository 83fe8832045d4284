"""The denoising objective: noisy inputs, targets, and the loss per sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from stagepatch.diffusion.variational import Posterior
from stagepatch.diffusion.weighting import Weighting, constant
from stagepatch.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Objective:
    """What a scheduler's config asks of a denoiser.

    Args:
        scheduler: a diffusers scheduler; its config decides betas (or sigmas) and prediction type.
        learn_sigma: the model's output holds the variance's interpolation behind its prediction (2C channels),
            trained by the bound of improved DDPM with the mean detached.
        weighting: weight of each sample's squared error.

    Raises:
        UserError: a prediction type that is none of epsilon, v_prediction, sample, flow.
    """

    def __init__(self, scheduler: Any, learn_sigma: bool = False, weighting: Weighting = constant) -> None:
        self.scheduler = scheduler
        self.is_flow = "FlowMatch" in type(scheduler).__name__
        self.prediction_type = "flow_prediction" if self.is_flow else scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction_type='{self.prediction_type}' is none of {', '.join(PREDICTION_TYPES)}.")
        if learn_sigma and self.is_flow:
            raise UserError("A flow has no posterior variance to learn: set learn_sigma to false.")
        self.learn_sigma = learn_sigma
        self.weighting = weighting
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self._posterior = Posterior(scheduler.betas) if learn_sigma else None

    def draw_timesteps(self, batch: int, generator: Generator) -> Tensor:
        """Uniform timesteps [B], from 0 to T − 1, on the generator's device."""
        return torch.randint(
            0, self.num_train_timesteps, (batch,), generator=generator, device=generator.device
        )

    def add_noise(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x_start and noise of that shape, at timesteps [B]."""
        if self.is_flow:
            sigma = self._sigma(timesteps, x_start)
            return (1.0 - sigma) * x_start + sigma * noise
        return self.scheduler.add_noise(x_start, noise, timesteps)  # type: ignore[no-any-return]

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """The timesteps as the model is told them: [B]."""
        if self.is_flow:
            return self._sigma(timesteps, timesteps.float()) * self.num_train_timesteps
        return timesteps

    def target(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        if self.prediction_type == "flow_prediction":
            return noise - x_start
        return self.scheduler.get_velocity(x_start, noise, timesteps)  # type: ignore[no-any-return]

    def loss(self, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of each sample, mean over its dimensions: [B].

        The bound enters with weight T/1000: L_simple + 0.001·L_vlb of improved DDPM, where L_vlb sums T terms.
        """
        output = output.float()
        prediction = output
        if self.learn_sigma:
            prediction, interpolation = output.chunk(2, dim=1)
        error = (prediction - self.target(x_start, noise, timesteps)) ** 2
        loss = self.weighting(self._snr(timesteps), self.prediction_type) * error.flatten(1).mean(dim=1)
        if self._posterior is not None:
            x_t = self.add_noise(x_start, noise, timesteps)
            predicted_x_start = self.predict_x_start(prediction.detach(), x_t, timesteps)
            bound = self._posterior.bound(x_start, x_t, timesteps, predicted_x_start, interpolation)
            loss = loss + bound * (self.num_train_timesteps / 1000.0)
        return loss

    def predict_x_start(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """x_start as the model's prediction implies it: [B, C, H, W]."""
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "flow_prediction":
            return x_t - self._sigma(timesteps, x_t) * prediction
        alpha_cumprod = self._alphas_cumprod(timesteps, x_t)
        signal, sigma = alpha_cumprod.sqrt(), (1.0 - alpha_cumprod).sqrt()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def _snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]: α²/σ² of x_t = α·x_start + σ·noise."""
        if self.is_flow:
            sigma = self._sigma(timesteps, timesteps.float())
            return ((1.0 - sigma) / sigma) ** 2
        alpha_cumprod = self._alphas_cumprod(timesteps, timesteps.float())
        return alpha_cumprod / (1.0 - alpha_cumprod)

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        # A scheduler's sigmas run from high noise to low.
        sigmas = self.scheduler.sigmas[: self.num_train_timesteps].flip(0)
        return sigmas.to(like.device, like.dtype)[timesteps].view(-1, *[1] * (like.ndim - 1))

    def _alphas_cumprod(self, timesteps: Tensor, like: Tensor) -> Tensor:
        picked = self.scheduler.alphas_cumprod.to(like.device, like.dtype)[timesteps]
        return picked.view(-1, *[1] * (like.ndim - 1))
