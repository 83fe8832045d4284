from .config import ObjectiveConfig as ObjectiveConfig
from .objective import Objective as Objective
from .schedule import make_scheduler as make_scheduler
from .weighting import WEIGHTINGS as WEIGHTINGS
