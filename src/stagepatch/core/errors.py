"""What the command line catches: a user's mistake, and a signal."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What was given, what was expected, and the way out, in its message.

    The command line prints the message alone and exits with code 2. It is a `ValueError`, so library users can
    catch it as they would any other bad argument.
    """


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of some kinds become a `UserError` that says first what they are about."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}") from error


class Interrupted(Exception):
    """A run was stopped by a signal, after it had saved what it needs to go on. `signum` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
