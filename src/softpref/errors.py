"""The one exception that means: the user can fix this."""

import importlib.util


class UsageError(ValueError):
    """A mistake in the user's input; its message names the file, row or option and the remedy.

    The command line prints the message alone and exits with code 2.
    """


def require_package(package: str, extra: str, what: str, otherwise: str = "") -> None:
    """Refuse what needs an optional package that is not installed.

    Args:
        package: its name.
        extra: softpref's extra that installs it.
        what: what needs it.
        otherwise: what to do without it, if anything.

    Raises:
        UsageError: the package is missing.
    """
    if importlib.util.find_spec(package) is None:
        remedy = f"pip install 'softpref[{extra}]'{otherwise}"
        raise UsageError(f"{what} needs the {package} package: {remedy}.")
