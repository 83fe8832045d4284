"""What can be learned on top of a converged model: each says what trains, its extra loss, how it is saved."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
