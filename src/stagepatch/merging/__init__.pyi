from .lora import merge_loras as merge_loras
from .merge import Ties as Ties
from .merge import combine as combine
from .merge import merge_models as merge_models
from .stream import TensorReader as TensorReader
from .stream import write_stream as write_stream
