"""Claims on cells, so that several processes or machines can share a study's directory.

A claim is an operating system lock on a file in that directory. One process holds it at a time, and
it ends with the process, however that ends. The lock files stay and mean nothing.
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
    """Yield whether this process holds the claim, and release it at the end of the block.

    Args:
        home: the shared directory.
        name: the name of the claim.
        patience: seconds to wait for another process to release it; -1 waits without limit.

    Raises:
        UsageError: the file system has no locks.
    """
    directory = home / "claims"
    directory.mkdir(parents=True, exist_ok=True)
    # A soft lock would outlive its process.
    lock = FileLock(directory / f"{name}.lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UsageError(
            f"{directory}: its file system has no locks; put --output where flock works, such as "
            "NFS 4, or Lustre mounted with -o flock."
        ) from error
    try:
        yield True
    finally:
        lock.release()
