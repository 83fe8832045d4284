"""A diagnosis of models whose trouble is known: of Gaussian pixels, where the best denoiser has a closed form."""

import copy
import math

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from stagepatch.analysis import Change, DiagnoseConfig, change, diagnose
from stagepatch.analysis.verdicts import decide
from stagepatch.data import ImageDataset
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.families import describe_structure, register

MEAN, DEVIATION = 0.5, 0.7
OBJECTIVE = Objective(make_scheduler(ObjectiveConfig(prediction_type="flow_prediction")))


def optimum(sigma):
    """a, b and loss of the best predictor a·x + b of noise − x_start for x = (1 − σ)·x_start + σ·noise."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * DEVIATION**2) / variance
    return slope, -MEAN - slope * (1 - sigma) * MEAN, 1 + DEVIATION**2 - slope**2 * variance


class Toy(ModelMixin, ConfigMixin):
    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.register_to_config(in_channels=1, out_channels=1, conditioning="none", sample_size=4)


class Affine(Toy):
    """a·x + b, one a and b for all noise levels, or knots over them; at the optimum, or at zero."""

    def __init__(self, knots=1, solved=True):
        super().__init__()
        levels = torch.linspace(0, 1, knots) if knots > 1 else torch.linspace(0, 1, 1000)
        slope, offset, _ = optimum(levels)
        if knots == 1:  # least squares over all levels, of E[x·v] and E[x²], with means
            mean, square = (
                (1 - levels) * MEAN,
                ((1 - levels) * DEVIATION) ** 2 + levels**2 + ((1 - levels) * MEAN) ** 2,
            )
            product = slope * square + offset * mean
            slope = (product.mean() - mean.mean() * -MEAN) / (square.mean() - mean.mean() ** 2)
            offset = -MEAN - slope * mean.mean()
        values = torch.stack([slope.reshape(-1), offset.reshape(-1)])
        self.knots = nn.Parameter(values if solved else torch.zeros_like(values))

    def forward(self, sample, timestep, return_dict=True):
        place = (timestep.float() / 1000).clamp(0, 1) * (self.knots.shape[1] - 1)
        low = place.floor().long().clamp(max=max(0, self.knots.shape[1] - 2))
        high, share = (low + 1).clamp(max=self.knots.shape[1] - 1), place - low
        slope, offset = (self.knots[:, low] * (1 - share) + self.knots[:, high] * share).view(2, -1, 1, 1, 1)
        return (slope * sample + offset,)


class Memory(Toy):
    """The best denoiser of its training images alone, which it knows by heart: they are its weights."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images.clone())

    def forward(self, sample, timestep, return_dict=True):
        sigma = (timestep.float() / 1000).view(-1, 1, 1, 1).clamp(0.001, 0.999)
        apart = (sample.unsqueeze(1) - (1 - sigma).unsqueeze(1) * self.images).flatten(2).square().sum(dim=2)
        shares = (-apart / (2 * sigma.view(-1, 1) ** 2)).softmax(dim=1)
        x_start = (shares @ self.images.flatten(1)).view_as(sample)
        return ((sample - x_start) / sigma,)


for each in (Affine, Memory):
    register(each.__name__, describe_structure)


def gaussian(count, seed):
    images = MEAN + DEVIATION * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return ImageDataset(images, torch.zeros(count, dtype=torch.long))


def diagnosed(model, images=1000, **options):
    config = DiagnoseConfig(**{"steps": 60, "rates": [0.03], "timesteps": 8, "images": 500, **options})
    return diagnose(config, model, OBJECTIVE, gaussian(images, 0), gaussian(1000, 1))
