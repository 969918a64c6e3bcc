"""The one exception that means: the user can mend this."""


class UsageError(ValueError):
    """A mistake in the user's input; its message names the file, row or option and the remedy.

    The command line prints the message alone and exits with code 2.
    """
