from .config import ModelConfig as ModelConfig
from .dit import DiT as DiT
from .sizes import DIT_SIZES as DIT_SIZES
