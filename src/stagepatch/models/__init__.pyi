from .config import ModelConfig as ModelConfig
from .convert import load_original_state_dict as load_original_state_dict
from .dit import DiT as DiT
from .pruning import check_prunable as check_prunable
from .pruning import prune as prune
from .sizes import DIT_SIZES as DIT_SIZES
