"""The denoising objective: noisy inputs, targets, and the loss per sample."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor

from stagepatch.core.errors import UserError
from stagepatch.diffusion.timesteps import TimestepSampler
from stagepatch.diffusion.variational import Posterior
from stagepatch.diffusion.weighting import Weighting, constant

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Objective:
    """What a scheduler's config asks of a denoiser.

    Args:
        scheduler: a diffusers scheduler; its config decides betas (or sigmas) and prediction type. Whether it
            is made for training or for sampling does not matter, nor whether it has sampled.
        learn_sigma: the model's output holds the variance's interpolation behind its prediction (2C channels),
            trained by the bound of improved DDPM with the mean detached.
        weighting: weight of each sample's squared error.
        timesteps: draws timesteps; by default all alike.

    Raises:
        UserError: a prediction type that is none of epsilon, v_prediction, sample, flow, or a scheduler that
            has no training schedule for it.
    """

    def __init__(
        self,
        scheduler: Any,
        learn_sigma: bool = False,
        weighting: Weighting = constant,
        timesteps: TimestepSampler | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.is_flow = "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))
        self.prediction_type = "flow_prediction" if self.is_flow else scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction_type='{self.prediction_type}' is none of {', '.join(PREDICTION_TYPES)}.")
        if not self.is_flow and (
            self.prediction_type == "flow_prediction" or not hasattr(scheduler, "alphas_cumprod")
        ):
            raise UserError(
                f"Cannot train with {type(scheduler).__name__} and prediction_type='{self.prediction_type}': "
                f"expected a scheduler with alphas_cumprod, such as DDPMScheduler, or for a flow "
                f"FlowMatchEulerDiscreteScheduler."
            )
        if learn_sigma and self.is_flow:
            raise UserError("A flow has no posterior variance to learn: set learn_sigma to false.")
        self.learn_sigma = learn_sigma
        self.weighting = weighting
        self.timesteps = timesteps
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self._posterior = Posterior(scheduler.betas) if learn_sigma else None
        # x_t = signal·x_start + sigma·noise. In float64: in half precision, the first timesteps' 1 − ᾱ vanishes.
        if self.is_flow:
            self._sigmas = _flow_sigmas(scheduler).double()
            self._signals = 1.0 - self._sigmas
        else:
            # Not every sampler has get_velocity; the one made for training has, and shares their config.
            self._training_scheduler = DDPMScheduler.from_config(scheduler.config)
            alphas_cumprod = scheduler.alphas_cumprod.double()
            self._sigmas = (1.0 - alphas_cumprod).sqrt()
            self._signals = alphas_cumprod.sqrt()

    def draw_timesteps(self, batch: int, generator: Generator) -> Tensor:
        """Timesteps [B], from 0 to T − 1, on the generator's device."""
        if self.timesteps is not None:
            return self.timesteps.draw(batch, generator)
        return torch.randint(0, self.num_train_timesteps, (batch,), generator=generator, device=generator.device)

    def add_noise(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x_start and noise of that shape, at timesteps [B]."""
        if self.is_flow:
            sigma = self._sigma(timesteps, x_start)
            return (1.0 - sigma) * x_start + sigma * noise
        # In half precision, diffusers would lose the noise of the first timesteps: 1 − ᾱ vanishes.
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        x_t: Tensor = self._training_scheduler.add_noise(x_start.to(dtype), noise.to(dtype), timesteps)
        return x_t.to(x_start.dtype)

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
        return self._training_scheduler.get_velocity(x_start, noise, timesteps)  # type: ignore[no-any-return]

    def loss(self, output: Tensor, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss of each sample, mean over its dimensions: [B].

        The bound enters with weight T/1000: L_simple + 0.001·L_vlb of improved DDPM, where L_vlb sums T terms.
        """
        output = output.float()
        prediction = output
        if self.learn_sigma:
            prediction, interpolation = output.chunk(2, dim=1)
        error = (prediction - self.target(x_start, noise, timesteps)) ** 2
        loss = self.weighting(self.snr(timesteps), self.prediction_type) * error.flatten(1).mean(dim=1)
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
        signal, sigma = self._signal(timesteps, x_t), self._sigma(timesteps, x_t)
        if self.prediction_type == "flow_prediction":
            return x_t - sigma * prediction
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio [B]: α²/σ² of x_t = α·x_start + σ·noise."""
        like = timesteps.float()
        return (self._signal(timesteps, like) / self._sigma(timesteps, like)) ** 2

    def _signal(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return _at(self._signals, timesteps, like)

    def _sigma(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return _at(self._sigmas, timesteps, like)


def _at(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """The values at timesteps [B], in the type of `like` and shaped to be multiplied with it."""
    # Cast before it moves: some accelerators have no float64.
    picked = values.to(like.dtype).to(like.device)[timesteps]
    return picked.view(-1, *[1] * (like.ndim - 1))


def _flow_sigmas(scheduler: Any) -> Tensor:
    """Sigmas of the training timesteps, from low to high: [T]."""
    config = scheduler.config
    if "FlowMatch" not in type(scheduler).__name__:
        # A solver that can also do flows has no training sigmas of its own.
        scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("flow_shift", 1.0))
    # A scheduler that has sampled holds the sigmas of its steps, and any holds them from high to low.
    sigmas: Tensor = type(scheduler).from_config(scheduler.config).sigmas[: config.num_train_timesteps]
    return sigmas.flip(0)
