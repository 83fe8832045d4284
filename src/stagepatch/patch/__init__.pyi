from .attachment import Attachment as Attachment
from .card import describe_patch as describe_patch
from .config import PatchConfig as PatchConfig
from .mixture import gate_entropy as gate_entropy
from .patch import Patch as Patch
from .patch import patches_on as patches_on
from .sites import with_condition as with_condition
