"""Images, labels and captions, as map-style datasets of {"image": [C, H, W] in [−1, 1], "label": int, …}."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
