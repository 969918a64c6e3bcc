"""Folders that last as long as a process; the next one removes what a killed one left."""

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

PREFIX = "softpref-"
OWNER = "owner"
"""A file that its process keeps locked: the system unlocks it with the process's end."""


def temporary_folder() -> tuple[str, Callable[[], None]]:
    """Return a new folder under `$TMPDIR`, and what removes it; first remove those of the dead."""
    collect(Path(tempfile.gettempdir()))
    fresh = tempfile.mkdtemp(prefix=f".{PREFIX}")
    lock = os.open(os.path.join(fresh, OWNER), os.O_CREAT | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: it is never collected
        fcntl.flock(lock, fcntl.LOCK_EX)
    folder = os.path.join(os.path.dirname(fresh), os.path.basename(fresh).removeprefix("."))
    os.rename(fresh, folder)  # only what is locked has the name that is looked for

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)

    return folder, remove


@functools.cache  # once a process: there may be thousands of other folders
def collect(home: Path) -> None:
    """Remove what dead processes of this user left; what else looks like it stays."""
    for folder in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another's, or has just gone
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            owner = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)
