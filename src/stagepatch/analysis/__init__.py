"""Where a model has room, what a patch has learned, and where it used it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
