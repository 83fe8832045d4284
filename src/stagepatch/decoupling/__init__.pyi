from .config import DecoupleConfig as DecoupleConfig
from .plan import Stage as Stage
from .plan import plan_stages as plan_stages
from .run import is_done as is_done
from .run import run_stage as run_stage
