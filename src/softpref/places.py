"""Where a command may write: said before it loads a model, not after an hour of work."""

import os
import tempfile
from pathlib import Path

from softpref.errors import UsageError

LONGEST_NAME = 255 - len(".record.json.lock")
"""Bytes of a name that leave room for what is written beside it."""
LONGEST_PATH = 4000


def directory_to_write(output: str) -> Path:
    """Return the path of a directory that is there or can be made.

    Raises:
        UsageError: it cannot; the message names `--output`.
    """
    path = file_to_write(output)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output {output}: is a file; give a directory.")
    return path


def file_to_write(output: str, flag: str = "--output") -> Path:
    """Return the path of a file that can be written once its folder is made.

    Raises:
        UsageError: it cannot; the message names the flag that gave it.
    """
    path = Path(output)
    new = [part for part in (path, *path.parents) if not os.path.lexists(part)]
    longest = max((len(os.fsencode(part.name)) for part in new), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(path.absolute())) > LONGEST_PATH:
        raise UsageError(f"{flag} {output}: the name is too long; give a shorter one.")
    there = next(each for each in (path, *path.parents, Path.cwd()) if os.path.lexists(each))
    if not there.exists():
        raise UsageError(
            f"{flag} {output}: {there} is a symbolic link to {os.readlink(there)}, which is not "
            "there; remove the link, or make what it points to."
        )
    home = there if there.is_dir() else there.parent
    if not there.is_dir() and there != path:
        raise UsageError(f"{flag} {output}: {there} is a file; give a path in a directory.")
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {output}: {home} cannot be written ({error.strerror}); choose a writable "
            "location."
        ) from None
    return path
