"""How far a long pass is: a bar on a terminal, a line every 30 seconds in a log."""

import logging
import sys
from time import monotonic

from tqdm import tqdm

_EVERY = 30.0
"""Seconds between two lines of a log."""

logger = logging.getLogger(__name__)


class Progress:
    """A pass over `total` of something, such as pairs; used as a context.

    Args:
        what: names the pass.
        total: how many there are.
        unit: of what.
        done: how many an interrupted pass has done before.
        is_silent: of the processes that do a pass together, all but the first say nothing.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, is_silent: bool = False
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = done
        self._is_silent = is_silent or sys.stderr.isatty()
        self._start = self._last = monotonic()
        self._bar = tqdm(
            desc=what, total=total, initial=done, unit=unit, leave=False, delay=1,
            disable=is_silent or None,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count what has been done since the last call."""
        self._done += count
        self._bar.update(count)
        now = monotonic()
        if self._is_silent or now - self._last < _EVERY:
            return
        self._last = now
        each = (now - self._start) / max(self._done - self._before, 1)
        logger.info(
            "%s: %d of %d %ss, about %.0f seconds left", self._what, self._done, self._total,
            self._unit, each * (self._total - self._done),
        )  # fmt: skip
