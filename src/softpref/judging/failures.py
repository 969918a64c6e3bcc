"""When failures of calls are the server's, and what helps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GIVE_UP_AFTER = 20  # failures of one kind in a row
GIVEN_UP = "given up"
CUT_OFF = "cut off"
CUT_ONCE = "cut off, asked again"
"""The failure of a reply whose question is asked once more, with room for a longer one."""
NOT_MADE = "not made"
"""The failure of a call in a batch that was not made, or may succeed later; nothing was paid."""
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


def is_passing(status: int) -> bool:
    """Return whether a call may succeed later, as the `openai` package has it."""
    return status in (408, 409, 429) or status >= 500


def is_refused(error: Exception) -> bool:
    """Return whether a server has answered that a request is wrong, now and later."""
    status = getattr(error, "status_code", None)
    return isinstance(status, int) and status >= 400 and not is_passing(status)


def batch_failed(name: str, batch: Any) -> str:
    """Return a message about a batch that made no call."""
    codes = []
    for error in getattr(getattr(batch, "errors", None), "data", None) or []:
        code = getattr(error, "code", None)
        if isinstance(code, str) and re.fullmatch(r"[a-z_]{1,40}", code):
            codes.append(code)
    reasons = f" ({', '.join(dict.fromkeys(codes))})" if codes else ""
    return (
        f"batch {name} failed{reasons} and cost nothing: check --judge_model and the batch "
        "limits of your account; run the same command to submit it again, or without --batch."
    )


def batch_remedy(may_be_paid: bool) -> str:
    """Return what to do after a failed request about a batch; one that may be paid is not left."""
    if may_be_paid:
        return "the same command continues, and submits nothing twice"
    return "run the same command again, or without --batch if the server has no batches"
