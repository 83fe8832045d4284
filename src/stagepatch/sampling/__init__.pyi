from .config import SamplingConfig as SamplingConfig
from .generate import Captions as Captions
from .generate import balanced_labels as balanced_labels
from .generate import generate as generate
from .pipeline import generate_with_pipeline as generate_with_pipeline
from .scheduler import make_sampler as make_sampler
