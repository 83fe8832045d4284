from .config import BOOKKEEPING as BOOKKEEPING
from .config import TrainingConfig as TrainingConfig
from .log import read_log as read_log
from .loop import train as train
