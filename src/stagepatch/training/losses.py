"""What a training step minimises: model, method and objective as one module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.diffusion import Objective
from stagepatch.families import input_dtype, predict
from stagepatch.methods import Method
from stagepatch.training.balancing import uncertainty_weighted
from stagepatch.training.ddo_config import DDOConfig
from stagepatch.training.draws import Draws


class DenoisingLoss(nn.Module):
    """The denoising loss and the method's own, in one module, so that processes share the gradients of what trains.

    Args:
        trained: all parameters that train.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, method: Method, objective: Objective, trained: nn.ParameterList) -> None:
        super().__init__()
        self.__dict__["model"] = model  # no submodule: processes have what trains in common, and nothing else
        self.trained = trained
        self.method = method
        self.objective = objective
        self.dtype = input_dtype(model)

    def forward(
        self,
        x_start: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: dict[str, Tensor],
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalars to log."""
        loss = self._denoising(x_start, noise, timesteps, condition, weights).mean()
        extra, logged = self.method.extra_loss()
        return loss if extra is None else loss + extra, {"loss": loss.detach(), **logged}

    def too_far(self, logged: dict[str, float]) -> str:
        """Why training should end here, judged by the means of what was logged; empty to go on."""
        return ""

    def _denoising(
        self,
        x_start: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: dict[str, Tensor],
        weights: Tensor | None = None,
    ) -> Tensor:
        """Of each sample: [B]."""
        self.method.x_start = x_start
        x_t = self.objective.add_noise(x_start, noise, timesteps).to(self.dtype)
        output = predict(self.model, x_t, self.objective.model_timesteps(timesteps), condition)
        return self.objective.loss(output, x_start, noise, timesteps, weights)


class UncertaintyLoss(DenoisingLoss):
    """Denoising losses of k intervals of timesteps, weighed by log-variances that train with the rest.

    Args:
        num_intervals: k; row i of a batch is of interval i mod k, as `IntervalSampler` draws it.
    """

    def __init__(
        self, model: nn.Module, method: Method, objective: Objective, trained: nn.ParameterList, num_intervals: int
    ) -> None:
        super().__init__(model, method, objective, trained)
        self.log_variances = nn.Parameter(torch.zeros(num_intervals))

    def forward(
        self,
        x_start: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: dict[str, Tensor],
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `DenoisingLoss`."""
        losses = self._denoising(x_start, noise, timesteps, condition, weights)
        loss = uncertainty_weighted(losses.view(-1, len(self.log_variances)).mean(dim=0), self.log_variances)
        extra, logged = self.method.extra_loss()
        variances = {f"log_variance_{number}": value for number, value in enumerate(self.log_variances.detach())}
        return loss if extra is None else loss + extra, {"loss": losses.detach().mean(), **variances, **logged}


class DDOLoss(DenoisingLoss):
    """Direct discriminative optimization (arXiv 2503.01103): −log σ(β Δ(real)) − α log σ(−β Δ(fake)), with
    Δ = −(loss − loss of the model as it was), each summed over the dimensions of a sample.

    Real images and samples of the model as it was share timesteps and noise. The model as it was needs no copy: what
    trains is set back to where it started for one forward without gradients.
    """

    def __init__(
        self, model: nn.Module, method: Method, objective: Objective, trained: nn.ParameterList, config: DDOConfig
    ) -> None:
        super().__init__(model, method, objective, trained)
        self.config = config
        self._start = [parameter.detach().clone() for parameter in trained]

    def forward(  # type: ignore[override]
        self,
        x_start: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        condition: dict[str, Tensor],
        fakes: Tensor,
        fake_condition: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `DenoisingLoss`.

        Args:
            fakes: samples [B, C, H, W] of the model as it was.
            fake_condition: what they were sampled with.
        """
        both = torch.cat([x_start, fakes])
        conditions = {name: torch.cat([value, fake_condition[name]]) for name, value in condition.items()}
        draws = (both, torch.cat([noise, noise]), torch.cat([timesteps, timesteps]), conditions)
        with torch.no_grad(), self._as_it_was():
            before = self._denoising(*draws)
        after = self._denoising(*draws)
        advantage = self.config.beta * x_start[0].numel() * (before - after)
        real, fake = advantage.chunk(2)
        loss = -F.logsigmoid(real).mean() - self.config.alpha * F.logsigmoid(-fake).mean()
        extra, logged = self.method.extra_loss()
        size = len(x_start)
        denoising, denoising_before = after[:size].detach().mean(), before[:size].mean()
        own = {
            "loss": loss.detach(),
            "denoising": denoising,
            "denoising_change": denoising / denoising_before - 1.0,
            "told_apart": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2.0,
        }
        return loss if extra is None else loss + extra, {**own, **logged}

    def too_far(self, logged: dict[str, float]) -> str:
        limit, change = self.config.max_denoising_change, logged["denoising_change"]
        if not 0.0 < limit < change:
            return ""
        return (
            f"the denoising loss has risen by {100 * change:.1f}%, over ddo.max_denoising_change={limit:g}; what was "
            f"learned so far is kept. A lower learning_rate may go further."
        )

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """What trains, where it started."""
        now = [parameter.data for parameter in self.trained]
        self._set([start.to(value.device) for start, value in zip(self._start, now, strict=True)])
        try:
            yield
        finally:
            self._set(now)
            torch.clear_autocast_cache()  # else the next forward would find these values there

    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value


def sample_losses(model: nn.Module, objective: Objective, draws: Draws) -> Tensor:
    """The loss of each sample, by the model's own objective: [B]."""
    x_t = objective.add_noise(draws.x_start, draws.noise, draws.timesteps).to(input_dtype(model))
    output = predict(model, x_t, objective.model_timesteps(draws.timesteps), draws.condition)
    return objective.loss(output, draws.x_start, draws.noise, draws.timesteps, draws.weights)
