"""What can be learned on top of a converged model: each says what trains, its extra loss, how it is saved."""

from stagepatch.methods.base import Method
from stagepatch.methods.dmp import DMP
from stagepatch.methods.finetune import Finetune

__all__ = ["DMP", "Finetune", "Method"]
