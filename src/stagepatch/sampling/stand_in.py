"""What stands in for a model's forward: callers go on calling the model that they know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families.registry import family_of


# An object rather than a closure, so that copy.deepcopy(model) copies with it what stands behind the model.
class StandIn(AbstractContextManager["StandIn"]):
    """Stands in for a model's forward; `detach()`, or the end of a `with` block, restores the model.

    Args:
        model: the model whose forward it is.
    """

    noun = "something"  # in the plural, for messages

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward = model.forward
        self._had_own_forward = "forward" in vars(model)  # such as a hook of accelerate
        # What reads the model's arguments by their names, as patches do, finds them as before.
        self.__signature__ = inspect.signature(model.forward)
        self._names = list(self.__signature__.parameters)
        self._timestep = family_of(type(model)).timestep_argument
        # The instance's attribute hides the class's method, and `model(...)` looks it up on the instance.
        model.forward = self
        self._is_attached = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take it off; further calls do nothing.

        Raises:
            UserError: something else has replaced the model's forward since.
        """
        if not self._is_attached:
            return
        if self._model.forward is not self:
            raise UserError(
                f"Something has replaced the model's forward since the {self.noun} came: take that off first."
            )
        del self._model.forward
        if self._had_own_forward:
            self._model.forward = self._forward
        self._is_attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def timestep_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward is told, None where it is not given."""
        return (dict(zip(self._names, args, strict=False)) | kwargs).get(self._timestep)


def check_free(model: nn.Module) -> None:
    """Refuse a model for whose forward something stands in already."""
    if isinstance(model.forward, StandIn):
        raise UserError(f"The model has {model.forward.noun} attached already: detach them first.")


def combine(function: Callable[[Tensor, Tensor], Tensor], own: Any, other: Any) -> Any:
    """One output of two, of the same kind: a tensor, a tuple or list of them, or diffusers' class."""
    if isinstance(own, Tensor):
        return function(own, other)
    if isinstance(own, dict):
        return type(own)(**{name: combine(function, value, other[name]) for name, value in own.items()})
    if own is None:
        return None
    return type(own)(combine(function, *each) for each in zip(own, other, strict=True))
