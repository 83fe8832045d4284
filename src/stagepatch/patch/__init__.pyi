from .attachment import Attachment as Attachment
from .attachment import patches_on as patches_on
from .config import PatchConfig as PatchConfig
from .patch import Patch as Patch
