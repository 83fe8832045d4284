"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """What was given, what was expected, and the way out, in its message.

    The command line prints the message alone and exits with code 2. It is a `ValueError`, so library users can
    catch it as they would any other bad argument.
    """
