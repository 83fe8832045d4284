from . import families as families
from . import models as models
from .models import DiT as DiT
from .patch import Patch as Patch
from .patch import PatchConfig as PatchConfig
from .patch import patches_on as patches_on

__version__: str
