"""What the calls of a paid judge cost, and have cost so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softpref.judging.log import VerdictLog

MILLION = 1e6
BATCH_SHARE = 0.5
"""What a call in a batch costs, as a share of its price."""


@dataclass
class Account:
    """Prices of tokens, and what was spent.

    Attributes:
        price_input: dollars per million input tokens; None if it is not known.
        price_output: likewise for output tokens.
        limit: dollars that may be spent; None for no limit.
        spent: upper bound of the dollars spent, including those of earlier runs.
        has_answered: whether any call succeeded, so that key and address must be valid.
        is_stopped: whether no further call may be made; those in flight are still counted.
        log: where the answers go; a batch keeps its journal beside it.
        judge: hash of the judge's identity, its name there.
    """

    price_input: float | None = None
    price_output: float | None = None
    limit: float | None = None
    spent: float = 0.0
    has_answered: bool = False
    is_stopped: bool = False
    log: VerdictLog | None = None
    judge: str = ""

    def resume(self, log: VerdictLog, judge: str) -> None:
        """Take over what earlier runs of a judge spent and learned."""
        self.log, self.judge, self.is_stopped = log, judge, False
        self.spent = self.dollars(*log.billed(judge)) or 0.0
        self.has_answered = judge in log.known

    def dollars(self, input_tokens: float, output_tokens: float) -> float | None:
        """Return the cost of tokens; None without prices."""
        if self.price_input is None or self.price_output is None:
            return None
        return (input_tokens * self.price_input + output_tokens * self.price_output) / MILLION

    def allows(self, dollars: float) -> bool:
        """Return whether this much more can be spent."""
        return self.limit is None or self.spent + dollars <= self.limit
