"""Finds what hangs by the processor time it gets, so that a busy machine is not a hanging test.

A process hangs if it and its descendants got next to no processor time for a minute. However many
others share the machine, what still works gets more than that.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

PATIENCE = 60.0
"""Seconds of wall time without progress after which a process hangs."""
LEAST = 2.0
"""Seconds of processor time that count as progress; launchers and servers that wait use less."""
POLL = 2.0


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process and all its descendants have had, seconds."""
    total = 0.0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.Error:  # it has just ended, and its time went to its parent
                continue
            total += times.user + times.system + times.children_user + times.children_system
    except psutil.Error:
        pass
    return total


def slowness() -> float:
    """Return how many times as long as alone work takes now: wall over processor time, 1 or more.

    For limits that the program under test sets itself, such as how long it waits for a server.
    """
    wall, own = time.monotonic(), time.thread_time()
    while time.thread_time() - own < 0.1:
        pass
    return max(1.0, (time.monotonic() - wall) / 0.1)


class Progress:
    """Watches the processor time of a process and its descendants."""

    def __init__(self, pid: int, patience: float = PATIENCE) -> None:
        self._pid, self._patience = pid, patience
        self._had, self._since = processor_seconds(pid), time.monotonic()

    def hang(self) -> str:
        """Say that the process hangs and how that was found; empty while it makes progress."""
        had, now = processor_seconds(self._pid), time.monotonic()
        if had - self._had >= LEAST or had < self._had:
            self._had, self._since = had, now
        if now - self._since < self._patience:
            return ""
        return (
            f"it hangs: {had - self._had:.1f} s of processor time in {now - self._since:.0f} s, "
            f"where {LEAST:.0f} s would be progress"
        )


def finished(started: subprocess.Popen, patience: float = PATIENCE) -> tuple[int, str]:
    """Wait for a process's end; return exit code and what it wrote to its pipes.

    Raises:
        AssertionError: it hangs; it and its session, if it leads one, were killed.
    """
    progress = Progress(started.pid, patience)
    while True:
        try:
            said = started.communicate(timeout=POLL)
            return started.returncode, "".join(filter(None, said))
        except subprocess.TimeoutExpired:
            if why := progress.hang():
                kill(started)
                said = "".join(filter(None, started.communicate()))
                raise AssertionError(f"{why}\n{said[-3000:]}") from None


def kill(started: subprocess.Popen) -> None:
    """Kill a process, and all of its session if it leads one."""
    if os.getpgid(started.pid) == started.pid:
        os.killpg(started.pid, 9)
    else:
        started.kill()


def wait_for(what: Callable[[], object], started: subprocess.Popen, every: float = 0.05) -> None:
    """Wait until something is so, which a running process is to bring about.

    Raises:
        AssertionError: the process has ended before, or hangs.
    """
    progress = Progress(started.pid)
    while not what():
        assert started.poll() is None, "it has ended before that"
        why = progress.hang()
        assert not why, why
        time.sleep(every)


@contextmanager
def watched(current: Callable[[], str], end: Callable[[str], None]) -> Iterator[None]:
    """Watch this process from a thread; call `end` with what hangs and why."""
    stopped = threading.Event()

    def watch() -> None:
        progress = Progress(os.getpid(), 2 * PATIENCE)
        while not stopped.wait(POLL):
            if (why := progress.hang()) and (name := current()):
                end(f"{name}: {why}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
