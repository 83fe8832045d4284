from .lora import combine_loras as combine_loras
from .lora import merge_loras as merge_loras
from .merge import ProjectedReader as ProjectedReader
from .merge import combine as combine
from .merge import merge_models as merge_models
from .stages import Stages as Stages
from .stages import find_stages as find_stages
from .stages import numbered_stages as numbered_stages
