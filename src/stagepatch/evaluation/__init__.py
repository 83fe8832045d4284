"""How good samples are: metrics on chosen features, and base against patched from the same noise."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
