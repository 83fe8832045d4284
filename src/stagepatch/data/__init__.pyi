from .config import DataConfig as DataConfig
from .dataset import ImageDataset as ImageDataset
from .dataset import in_memory as in_memory
from .dataset import load_dataset as load_dataset
from .digits import load_digits as load_digits
from .folder import ImageFolder as ImageFolder
