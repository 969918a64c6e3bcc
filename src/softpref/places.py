"""Check output paths before a command loads a model, not after an hour of work."""

import os
import tempfile
from pathlib import Path

from softpref.errors import UsageError

LONGEST_NAME = 255 - len(".record.json.lock")
"""Bytes of a file name, with room for the suffixes of files beside it."""
LONGEST_PATH = 4000


def directory_to_write(output: str) -> Path:
    """Return the path of a directory that exists or can be created.

    Raises:
        UsageError: it cannot be created; the message names `--output`.
    """
    path = file_to_write(output)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output {output}: is a file; give a directory.")
    return path


def file_to_write(output: str, flag: str = "--output") -> Path:
    """Return the path of a file that can be written once its folder is created.

    Raises:
        UsageError: it cannot be written; the message names its flag.
    """
    path = Path(output)
    new = [part for part in (path, *path.parents) if not os.path.lexists(part)]
    longest = max((len(os.fsencode(part.name)) for part in new), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(path.absolute())) > LONGEST_PATH:
        raise UsageError(f"{flag} {output}: the name is too long; give a shorter one.")
    found = next(each for each in (path, *path.parents, Path.cwd()) if os.path.lexists(each))
    if not found.exists():
        raise UsageError(
            f"{flag} {output}: {found} is a symbolic link to {os.readlink(found)}, which does not "
            "exist; remove the link, or create its target."
        )
    home = found if found.is_dir() else found.parent
    if not found.is_dir() and found != path:
        raise UsageError(f"{flag} {output}: {found} is a file; give a path in a directory.")
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {output}: {home} cannot be written ({error.strerror}); choose a writable "
            "location."
        ) from None
    return path
