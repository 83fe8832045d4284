"""Objectives: what a denoiser is asked for at each timestep, and how its answer is scored."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
