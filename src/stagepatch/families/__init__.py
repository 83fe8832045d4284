"""What a patch needs to know of a model family: its sites and its condition. A row in `table`, or a file, a family."""

import lazy_loader

from stagepatch.families import (
    briafibo,
    cogvideox,
    cogview,
    dit,
    ernie,
    flux,
    flux2,
    glmimage,
    hidream,
    hunyuan,
    ideogram4,
    krea2,
    qwenimage,
    table,
    unet,
    video,
    zimage,
)
from stagepatch.families.registry import add_families

add_families([*dit.FAMILIES, *unet.FAMILIES, *table.FAMILIES, *flux.FAMILIES, *cogview.FAMILIES])
add_families([*qwenimage.FAMILIES, *hunyuan.FAMILIES, *video.FAMILIES])
add_families(each.FAMILY for each in (cogvideox, flux2, glmimage, hidream, briafibo, zimage, krea2, ernie, ideogram4))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
