"""Generation: image i of a seed is the same whatever the batches and processes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
