from .config import TrainingConfig as TrainingConfig
from .loop import train as train
from .signals import Interrupted as Interrupted
