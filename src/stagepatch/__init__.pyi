from . import backbones as backbones
from . import models as models
from .models import DiT as DiT
from .patch import Patch as Patch
from .patch import PatchConfig as PatchConfig

__version__: str
