"""Many runs as one thing: methods compared, stages decoupled; jobs here or through submitit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
