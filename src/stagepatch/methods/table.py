"""From a method's name to the method."""

import pkgutil

from stagepatch.methods.base import Method
from stagepatch.methods.config import METHODS, MethodConfig


def make_method(config: MethodConfig, facts: dict[str, str] | None = None) -> Method:
    """The method that a config names, yet to be trained.

    Args:
        facts: how it is trained, in words.

    Raises:
        UserError: choices that it cannot take.
    """
    return method_class(config.method).from_config(config, facts or {})


def method_class(name: str) -> type[Method]:
    """The class of a method of METHODS."""
    found: type[Method] = pkgutil.resolve_name(METHODS[name])
    return found
