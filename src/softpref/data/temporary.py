"""Temporary folders and files; the next process removes what a killed one left."""

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = "softpref-"
OWNER = "owner"
"""A file that its process keeps locked: the system unlocks it with the process's end."""
PARTIAL_FILE = ".softpref-*.partial"
"""A file that its process keeps locked until it is whole and has its own name."""


def temporary_folder() -> tuple[str, Callable[[], None]]:
    """Return a new folder under `$TMPDIR`, and what removes it; first remove those of the dead."""
    remove_leftovers(Path(tempfile.gettempdir()))
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
def remove_leftovers(home: Path) -> None:
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which becomes `path` once it is whole and on disk."""
    collect_partials(path.parent)
    partial, lock = _locked_partial(path.parent)
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        os.close(lock)


def _locked_partial(directory: Path) -> tuple[Path, int]:
    while True:
        partial = directory / PARTIAL_FILE.replace("*", os.urandom(8).hex())
        lock = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks: it is never collected
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.exists():  # else it was collected before it was locked
            return partial, lock
        os.close(lock)


def collect_partials(directory: Path) -> None:
    """Remove the files that dead processes left half-written in a directory."""
    for partial in directory.glob(PARTIAL_FILE):
        with contextlib.suppress(OSError):  # another process writes it, or it has just gone
            owner = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(owner)


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(directory: Path) -> None:
    """Make the files of a directory, and their names, survive a loss of power."""
    for path in (*(path for path in directory.iterdir() if path.is_file()), directory):
        fsync(path)
