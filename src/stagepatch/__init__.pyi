from . import families as families
from . import models as models
from . import report as report
from .checkpoints import load_denoiser as load_denoiser
from .core import UserError as UserError
from .data import DataConfig as DataConfig
from .evaluation import Evaluator as Evaluator
from .evaluation import evaluate as evaluate
from .merging import merge as merge
from .methods import LoRAConfig as LoRAConfig
from .methods import open_artifact as open_artifact
from .models import DiT as DiT
from .patch import Patch as Patch
from .patch import PatchConfig as PatchConfig
from .patch import patches_on as patches_on
from .sampling import SamplingConfig as SamplingConfig
from .sampling import generate as generate
from .training import Run as Run
from .training import TrainConfig as TrainConfig
from .training import TrainingConfig as TrainingConfig
from .training import train as train

__version__: str
