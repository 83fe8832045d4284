from .export import export_lora as export_lora
from .folder import write_folder as write_folder
from .hub import push_folder as push_folder
