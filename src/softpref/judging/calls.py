"""A queue of concurrent calls within a limit of dollars, none of which can hold up the rest."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from softpref.judging.account import Account

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Caller(Protocol[_Item, _Result]):
    """Makes one call per item."""

    account: Account
    concurrency: int

    def call(self, item: _Item) -> _Result:
        """Make a call, with its retries; a failure is a result. Threads run it at once."""

    def abandoned(self, item: _Item) -> _Result:
        """Return the result of a call that exceeded its total time."""

    def again(self, item: _Item, result: _Result) -> _Item | None:
        """Return what to ask next because of this result, if anything."""

    def billed(self, result: _Result) -> tuple[int, int]:
        """Return the tokens that may be billed for a result."""

    def most_tokens(self, item: _Item) -> tuple[int, int]:
        """Return upper bounds of input and output tokens of a call with all its retries."""

    def longest_call(self) -> float:
        """Return the maximum seconds of a call with all its retries."""


def make_calls(
    caller: Caller[_Item, _Result], items: Sequence[_Item]
) -> Iterator[tuple[_Item, _Result]]:
    """Yield results as they arrive; abandon a call that exceeds its total time.

    Calls stop early if the next one could exceed the account's limit, the account is stopped, or a
    call raises, which is raised in the end; the remaining items are not asked. Calls in flight may
    be paid, so their results are always yielded.
    """
    account = caller.account
    asked: queue.SimpleQueue[tuple[int, _Item] | None] = queue.SimpleQueue()
    answered: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    limit, workers, abandoned = min(caller.concurrency, len(items)), 0, 0
    left, reserved, numbers = deque(items), 0.0, itertools.count()
    in_flight: dict[int, tuple[_Item, float, float]] = {}  # the oldest first
    error: Exception | None = None
    try:
        while True:
            while left and len(in_flight) < limit and not (error or account.is_stopped):
                cost = account.dollars(*caller.most_tokens(left[0])) or 0.0
                if not account.allows(reserved + cost):
                    break
                reserved += cost
                number, item = next(numbers), left.popleft()
                in_flight[number] = item, cost, time.monotonic() + caller.longest_call()
                asked.put((number, item))
            if not in_flight:
                if error:
                    raise error
                return
            while workers < limit + abandoned:
                workers += 1
                # Daemons, since an interrupted command must not wait for pending calls.
                arguments = (caller, asked, answered)
                threading.Thread(target=_work, args=arguments, daemon=True).start()
            number, result = _next(answered, in_flight)
            if number not in in_flight:  # it was abandoned
                continue
            item, cost, _ = in_flight.pop(number)
            reserved -= cost
            if result is None:
                result = caller.abandoned(item)
                abandoned += 1
            if isinstance(result, Exception):
                error = error or result
                continue
            account.spent += account.dollars(*caller.billed(result)) or 0.0
            if (more := caller.again(item, result)) is not None:
                left.appendleft(more)
            yield item, result
    finally:
        for _ in range(workers):
            asked.put(None)


def _next(
    answered: queue.SimpleQueue[tuple[int, Any]], in_flight: Mapping[int, tuple[Any, float, float]]
) -> tuple[int, Any]:
    """Return the next result, or None for the oldest call after its deadline."""
    number, (_, _, end) = next(iter(in_flight.items()))
    try:
        return answered.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        return number, None


def _work(caller: Caller[Any, Any], asked: Any, answered: Any) -> None:
    while (found := asked.get()) is not None:
        number, item = found
        try:
            answered.put((number, caller.call(item)))
        except Exception as error:
            answered.put((number, error))
