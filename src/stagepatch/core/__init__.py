"""What every room uses and which knows nothing of diffusion: errors, files, settings, processes, randomness."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
