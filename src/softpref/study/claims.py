"""Who runs what, where several processes or machines share a study's directory.

A claim is a lock of the operating system on a file of that directory: of two claimants one gets it,
and when its process dies, however it dies, the lock is gone. The files stay; they mean nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from softpref.errors import UsageError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def claimed(home: Path, name: str, *, patience: float = 0.0) -> Iterator[bool]:
    """Yield whether this process has the claim; it is given up at the end of the block.

    Args:
        home: the shared directory.
        name: what is claimed.
        patience: how long to wait for another's claim to end, seconds; -1 is as long as it takes.

    Raises:
        UsageError: the file system has no locks.
    """
    directory = home / "claims"
    directory.mkdir(parents=True, exist_ok=True)
    # What filelock falls back to outlives its process.
    lock = FileLock(directory / f"{name}.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise _without_locks(directory) from error
    try:
        yield True
    finally:
        lock.release()


def _without_locks(directory: Path) -> UsageError:
    return UsageError(
        f"{directory}: its file system has no locks; put --output where flock works, such as "
        "NFS 4, or Lustre mounted with -o flock."
    )
