"""What looks at a run while it trains, and changes nothing."""

from typing import Protocol

from torch import nn

from stagepatch.training.log import RunLog


class Check(Protocol):
    """Called between steps, with what is learned on the model: averaged where there is an average, a patch at rest."""

    def is_due(self, done: int, steps: int) -> bool:
        """Whether it is to be called after `done` steps of `steps`."""

    def __call__(self, model: nn.Module, done: int, log: RunLog) -> None:
        """Look; every process calls it, and what is found goes to the log."""
