from .config import ObjectiveConfig as ObjectiveConfig
from .config import WeightingConfig as WeightingConfig
from .objective import Objective as Objective
from .schedule import make_scheduler as make_scheduler
from .timesteps import TimestepSampler as TimestepSampler
from .weighting import Weighting as Weighting
from .weighting import make_weighting as make_weighting
