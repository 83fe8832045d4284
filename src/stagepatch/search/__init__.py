"""What is found by trying: weights of a merge, and which model denoises which step."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
