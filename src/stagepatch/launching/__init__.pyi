from .config import LaunchConfig as LaunchConfig
from .launch import launch as launch
