"""Temporary folders and files; the next process removes those of a killed process."""

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
"""A file that its process keeps locked; the system unlocks it when the process ends."""
PARTIAL_FILE = ".softpref-*.partial"
"""A file that its process keeps locked until it is complete and renamed."""


def temporary_folder() -> tuple[str, Callable[[], None]]:
    """Return a new folder under `$TMPDIR` and a function to remove it; remove leftovers first."""
    remove_leftovers(Path(tempfile.gettempdir()))
    fresh = tempfile.mkdtemp(prefix=f".{PREFIX}")
    lock = os.open(os.path.join(fresh, OWNER), os.O_CREAT | os.O_RDWR, 0o600)
    with contextlib.suppress(OSError):  # without file locks it is never collected
        fcntl.flock(lock, fcntl.LOCK_EX)
    folder = os.path.join(os.path.dirname(fresh), os.path.basename(fresh).removeprefix("."))
    os.rename(fresh, folder)  # only locked folders have the name that is searched for

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)

    return folder, remove


@functools.cache  # once per process: there may be thousands of other folders
def remove_leftovers(home: Path) -> None:
    """Remove the folders that dead processes of this user left."""
    for folder in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, or was just removed
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
    """Yield a temporary path beside `path`; rename it to `path` once it is complete and on disk."""
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
        with contextlib.suppress(OSError):  # without file locks it is never collected
            fcntl.flock(lock, fcntl.LOCK_EX)
        if partial.exists():  # else it was collected before it was locked
            return partial, lock
        os.close(lock)


def collect_partials(directory: Path) -> None:
    """Remove the files that dead processes left half-written in a directory."""
    for partial in directory.glob(PARTIAL_FILE):
        with contextlib.suppress(OSError):  # another process is writing it, or has just removed it
            owner = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(owner)


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(directory: Path) -> None:
    """Flush the files of a directory, and its entries, to disk."""
    for path in (*(path for path in directory.iterdir() if path.is_file()), directory):
        fsync(path)
