"""When failures of calls are the server's, and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIVE_UP_AFTER = 20  # failures of one kind in a row
GIVEN_UP = "given up"
CUT_OFF = "cut off"
CUT_ONCE = "cut off, asked again"
"""The failure of a reply whose question is asked once more, with room for a longer one."""
NOT_MADE = "not made"
"""The failure of a call that a batch accepted and did not make; nothing was paid."""
OPEN = (GIVEN_UP, CUT_ONCE, NOT_MADE)
"""Failures that are no answer: the question is still to be asked."""


class Streak:
    """The last consecutive calls that came to the same failure, or to none.

    Args:
        calls: number of calls in total.
        is_known: whether the server has given an answer before.

    Attributes:
        items: what was asked in them.
    """

    def __init__(self, calls: int, is_known: bool) -> None:
        self.items: list[Any] = []
        self._calls, self._is_known = calls, is_known
        self._failure: str | None = None
        self._asked = 0

    def add(self, item: Any, failure: str | None) -> bool:
        """Count a call; return whether the server must be the cause of the failures."""
        self._asked += 1
        self.items = [*self.items, item] if self._failure == failure and self.items else [item]
        self._failure = failure
        if failure is None:
            return False
        length = len(self.items)
        is_unreachable = failure == "no connection" or failure.startswith("status")
        if length == self._asked == self._calls:
            return is_unreachable
        is_first = length == self._asked and not self._is_known
        return length == GIVE_UP_AFTER and (is_unreachable or is_first)


def stopped(failure: str, count: int, model: str, remedies: Mapping[str, str]) -> str:
    """Return a message that says why a run stopped, and which flag helps.

    Args:
        failure: of the last calls.
        count: their number.
        model: the flag that names the model.
        remedies: of the command, by failure.
    """
    timeout = "give a larger --timeout_s, or a smaller --concurrency"
    usual = timeout if failure == "timeout" else f"check quota, --base_url and {model}"
    return (
        f"{count} calls in a row failed ({failure}): {remedies.get(failure, usual)}; run the same "
        "command to ask them again and continue."
    )
