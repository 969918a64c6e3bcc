"""Progress of a long pass: a bar on a terminal, a line every 30 seconds in a log."""

import logging
from time import monotonic

from tqdm import tqdm

_EVERY = 30.0
"""Seconds between log lines."""

logger = logging.getLogger(__name__)


class Progress:
    """Context manager that reports the progress of a pass over `total` items.

    Args:
        what: name of the pass.
        total: number of items.
        unit: name of an item, such as "pair".
        done: number of items that an interrupted pass has completed.
        is_silent: for all but the first of several processes.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, is_silent: bool = False
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = done
        self._start = self._last = monotonic()
        off = is_silent or None  # None: tqdm checks for a terminal
        self._bar = tqdm(
            desc=what, total=total, initial=done, unit=unit, leave=False, delay=1, disable=off
        )
        self._is_silent = is_silent or not self._bar.disable

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count the items completed since the last call."""
        self._done += count
        self._bar.update(count)
        now = monotonic()
        if self._is_silent or now - self._last < _EVERY:
            return
        self._last = now
        per_item = (now - self._start) / max(self._done - self._before, 1)
        seconds = f"about {per_item * (self._total - self._done):.0f} seconds left"
        logger.info(f"{self._what}: {self._done} of {self._total} {self._unit}s, {seconds}")
