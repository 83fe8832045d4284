"""One copy a range of timesteps, each trained on its own (DeMe, arXiv 2410.06664)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
