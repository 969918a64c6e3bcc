"""The exception for errors that the user can fix, and helpers that raise it."""

import importlib.util
import os
import stat


class UsageError(ValueError):
    """A mistake in the user's input; its message names the file, row or option and the remedy.

    The command line prints the message alone and exits with code 2.

    Attributes:
        in_flags: the message with options as flags of the command line, `--beta 0.1`; `str(error)`
            has them as arguments, `beta=0.1`, once `softpref.arguments` has reworded it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.in_flags = message


def first_line(error: BaseException) -> str:
    """Return an exception's message in one line without a final period."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first.rstrip(".")


def has_package(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a mere folder has no origin


def require_package(package: str, extra: str, what: str, otherwise: str = "") -> None:
    """Refuse a feature whose optional package is not installed.

    Args:
        package: its name.
        extra: softpref's extra that installs it.
        what: the feature that needs it.
        otherwise: an alternative, appended to the remedy.

    Raises:
        UsageError: the package is missing.
    """
    if not has_package(package):
        remedy = f"pip install 'softpref[{extra}]'{otherwise}"
        raise UsageError(f"{what} needs the {package} package: {remedy}.")


def refuse_streams(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a pipe, socket or device: it may never end, and can be read only once.

    Args:
        path: an existing path.
        what: its name in the message.

    Raises:
        UsageError: it is neither a file nor a directory.
        OSError: the path does not exist or is not accessible.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise UsageError(f"{what}: is a {kind}; write it to a file first and give that file.")
