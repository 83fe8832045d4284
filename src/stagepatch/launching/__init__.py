"""Jobs in processes of their own, here or on a cluster, through submitit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
