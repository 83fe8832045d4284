from .config import BOOKKEEPING as BOOKKEEPING
from .config import TrainingConfig as TrainingConfig
from .log import read_log as read_log
from .loop import train as train
from .run import RUN_CONFIG as RUN_CONFIG
from .run import Run as Run
from .run_config import PretrainConfig as PretrainConfig
from .run_config import TrainConfig as TrainConfig
