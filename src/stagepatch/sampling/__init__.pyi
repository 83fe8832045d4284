from .config import SamplingConfig as SamplingConfig
from .generate import balanced_labels as balanced_labels
from .generate import generate as generate
from .scheduler import make_sampler as make_sampler
