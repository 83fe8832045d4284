"""The search for a schedule: which model of a zoo, or none, for each of a sampler's steps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
