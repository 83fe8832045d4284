"""What a patch needs to know of a model family: its sites and its condition. A row in `table`, or a file, a family."""

import lazy_loader

from stagepatch.families import cogvideox, dit, flux, hunyuan, qwenimage, table, unet, video
from stagepatch.families.registry import add_families

add_families([*dit.FAMILIES, *unet.FAMILIES, *table.FAMILIES, flux.FAMILY, *qwenimage.FAMILIES])
add_families([cogvideox.FAMILY, *hunyuan.FAMILIES, *video.FAMILIES])

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
